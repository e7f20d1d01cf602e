"""The two halves of a transceiver: all exports of a rank, and all imports. The roles bring them.

`Half` is what the transceiver asks of one; `Halves` holds those that a worker's role has, and passes calls on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kv_transfer.environment import Environment
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import EXPORT_CALLS, Call
from kv_transfer.staging import Staging, StagingUse
from pdserve.errors import TransferError
from pdserve.protocol import Key, KvRank


class Half(Protocol):
    """All handoffs of one rank in one direction: `context_worker.handoffs.Exports`, or
    `generation_worker.handoffs.Imports`. A half knows nothing of the other.

    Life cycle: made → `open`, in the transceiver's loop, which all other calls belong to → `close` → `settle`.
    """

    unpacks: bool
    """Whether messages are unpacked from its staging into the pool, and not packed into it."""

    async def open(self, env: Environment, staging: Staging) -> int:
        """Start, with `staging` for its own use. Returns the port that it listens at; 0 if it does not listen.

        Raises:
            OSError: the address is taken, or not this host's.
        """
        ...

    def meet(self, ranks: tuple[KvRank, ...], rank: int) -> None:
        """Learn that this is number `rank` of the worker's `ranks`. Not called for a worker of one rank."""

    def run(self, call: Call, mark: Mark) -> None:
        """Carry out a call of the engine. What depends on the engine's computing waits until `mark` is reached."""

    def knows(self, key: Key) -> bool:
        """Whether there is a handoff of `key` that is not over."""
        ...

    def abort(self, key: Key, error: TransferError | None = None) -> None:
        """Stop a handoff, for `error` or because the request was withdrawn."""

    def close(self) -> None:
        """End every handoff and every link."""

    async def settle(self) -> None:
        """After `close`: wait until no peer can read the blocks that were offered any more."""


class Halves:
    """The halves of one rank, at least one. All but `staging_use` must be called in the transceiver's loop."""

    def __init__(self, exports: Half | None, imports: Half | None) -> None:
        assert exports is not None or imports is not None, "a transceiver sends, receives, or does both"
        self._exports = exports
        self._imports = imports
        self._all = [half for half in (imports, exports) if half is not None]
        self._staging: list[Staging] = []

    @property
    def exports(self) -> Half:
        assert self._exports is not None, "a generation worker's transceiver exports nothing"
        return self._exports

    @property
    def imports(self) -> Half:
        assert self._imports is not None, "a context worker's transceiver imports nothing"
        return self._imports

    @property
    def can_export(self) -> bool:
        return self._exports is not None

    @property
    def staging_use(self) -> StagingUse:
        """How much staging both have, and how much is in use. From any thread."""
        return StagingUse.of_all(staging.use for staging in tuple(self._staging))

    async def open(self, env: Environment, new_staging: Callable[[bool], Staging]) -> int:
        """Start all halves. Returns the port that this rank listens at; 0 if it does not listen.

        Args:
            new_staging: makes the staging of one half; called with that half's `unpacks`.
        """
        port = 0
        for half in self._all:
            self._staging.append(new_staging(half.unpacks))
            port = await half.open(env, self._staging[-1]) or port
        return port

    def meet(self, ranks: tuple[KvRank, ...], rank: int) -> None:
        """As `Half.meet`."""
        for half in self._all:
            half.meet(ranks, rank)

    def run(self, call: Call, mark: Mark) -> None:
        """Pass `call` to the half that it concerns."""
        (self.exports if isinstance(call, EXPORT_CALLS) else self.imports).run(call, mark)

    async def close(self) -> None:
        """End every handoff and every link; returns once no peer reads what was offered."""
        for half in reversed(self._all):
            half.close()
        for half in self._all:
            await half.settle()

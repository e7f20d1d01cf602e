"""Rank 0 of several: passes the engine's calls on to every rank, and combines their endings into one.

No block is free on any rank before every rank is done with it: a handoff ends when all ranks have ended their part. If
one rank's part fails, the others are told to stop, and the first error that gives a reason is the handoff's. A rank
counts as lost if it does not end its part within a transfer's time limit after rank 0 has ended its own, or after
another part has failed; or if it says nothing for as long. Without that rank the worker can neither send nor receive,
so it is told to end.

Life cycle: `join` waits for all followers → calls and endings → `close`. Everything happens in the transceiver's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from kv_transfer.counters import merge
from kv_transfer.environment import Environment, Post
from kv_transfer.halves import Halves
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import (
    AbortExport,
    AbortImport,
    Accept,
    Call,
    Computed,
    Counted,
    Offer,
    Up,
    World,
    alive_s,
    as_transfer_error,
    decode_report,
    encode,
)
from kv_transfer.ranks.relay import Relay, guarded
from kv_transfer.ranks.steps import Steps
from kv_transfer.staging import StagingUse
from pdserve.errors import TransferError
from pdserve.handoff import (
    FREE,
    ExportDone,
    ExportFailed,
    HandoffCost,
    HandoffEvent,
    ImportDone,
    ImportFailed,
    ImportOffered,
)
from pdserve.protocol import Key, KvRank, TransferCounts


@dataclass(eq=False)
class _Open:
    """A handoff that not every rank has ended."""

    is_export: bool
    key: Key
    waiting_for: set[int]
    deadline: asyncio.TimerHandle | None = None
    error: TransferError | None = None
    first_token: int | None = None
    cost: HandoffCost = FREE

    @property
    def event(self) -> HandoffEvent:
        if self.is_export:
            return ExportFailed(self.key, self.error) if self.error else ExportDone(self.key, self.cost)
        if self.error is not None:
            return ImportFailed(self.key, self.error)
        assert self.first_token is not None, "an import is done with its first token"
        return ImportDone(self.key, self.first_token, self.cost)


class Leader:
    """`Ranks` of rank 0.

    Args:
        num_ranks: of the worker, with this one.
        grace_s: how much later than a transfer's time limit a follower may report an ending: it may have waited for a
            long step of the engine first.
    """

    rank = 0
    accepts_early = False

    def __init__(self, relay: Relay, num_ranks: int, grace_s: float = 5.0) -> None:
        self.steps = Steps()
        self._relay = relay
        self._num_ranks = num_ranks
        self._grace_s = grace_s
        self._open: dict[tuple[bool, Key], _Open] = {}
        self._followers: dict[int, KvRank] = {}
        self._all_up = asyncio.Event()
        self._exports_over = asyncio.Event()
        self._counts: dict[int, list[TransferCounts]] = {}
        self._staging: dict[int, StagingUse] = {}
        self._hindrances: dict[int, str] = {}
        self._silent_s = dict.fromkeys(range(1, num_ranks), 0.0)
        self._watching: asyncio.TimerHandle | None = None
        self._lost: TransferError | None = None

    async def join(self, halves: Halves, env: Environment, post: Post, own: KvRank) -> tuple[KvRank, ...]:
        """Wait for every follower; returns where all ranks are. `post` gets one ending for each handoff."""
        self._halves, self._post = halves, post
        self._patience_s, self._alive_s = env.timeout_s + self._grace_s, alive_s(env.timeout_s)
        self._stall_timeout_s = env.stall_timeout_s
        self._loop = asyncio.get_running_loop()
        self._fail = env.fail
        self._relay.start(guarded(self._on_frame, env.fail))
        await self._all_up.wait()
        ranks = (own, *(self._followers[rank] for rank in range(1, self._num_ranks)))
        self._relay.send(encode(World(ranks)))
        halves.meet(ranks, 0)
        self._watch()
        return ranks

    def handle(self, call: Call, mark: Mark) -> None:
        """Pass `call` on to all ranks. One that starts a handoff is answered by one ending."""
        if isinstance(call, Computed) and call.layers is not None:
            self._halves.run(call, mark)
            return
        if isinstance(call, Accept) and not self._halves.imports.knows(call.key):
            self._halves.run(call, mark)  # it is over or never was: rank 0 alone answers
            return
        if isinstance(call, Offer | Accept):
            opened = self._begin(isinstance(call, Offer), call.key)
            if self._lost is not None:
                self._end(opened, self._lost)
                return
        self._relay.send(encode(call))
        self._halves.run(call, mark)

    def on_event(self, event: HandoffEvent) -> None:
        """Rank 0's own sender or receiver has something to say."""
        if isinstance(event, ImportOffered):
            self._post(event)
            return
        is_export = isinstance(event, ExportDone | ExportFailed)
        error = event.error if isinstance(event, ExportFailed | ImportFailed) else None
        first_token = event.first_token if isinstance(event, ImportDone) else None
        if isinstance(event, ExportDone | ImportDone):
            self._add_cost(is_export, event.key, event.cost)
        self._take(0, is_export, event.key, error, first_token)

    def lose(self, rank: int, cause: str) -> None:
        """`rank` is gone: end what it has not ended, whatever comes, and the worker."""
        self._lost = TransferError(f"rank {rank} of this worker is lost: {cause}", "aborted")
        # What it reported last is true no longer.
        self._staging.pop(rank, None)
        self._hindrances.pop(rank, None)
        for each in list(self._open.values()):
            self._take(rank, each.is_export, each.key, self._lost, None)
        self._fail(self._lost)

    def merge(self, counts: list[TransferCounts]) -> list[TransferCounts]:
        """Rank 0's counters with those that the followers have reported last."""
        return merge([counts, *self._counts.values()])

    @property
    def staging_of_others(self) -> StagingUse:
        return StagingUse.of_all(tuple(self._staging.values()))

    @property
    def hindrance_of_others(self) -> str:
        return next((why for why in list(self._hindrances.values()) if why), "")

    async def close(self) -> None:
        """End what followers have not ended, exports not before their peers have stopped to read: they were told to
        promise nothing more when rank 0 ended its part."""
        self._exports_over.clear()
        with contextlib.suppress(TimeoutError):
            if self._exporting:
                await asyncio.wait_for(self._exports_over.wait(), self._stall_timeout_s)
        for each in list(self._open.values()):
            self._end(each, each.error or TransferError("the transceiver was closed", "aborted"))
        if self._watching is not None:
            self._watching.cancel()
        self._relay.close()

    @property
    def _exporting(self) -> bool:
        return any(each.is_export for each in self._open.values())

    def _begin(self, is_export: bool, key: Key) -> _Open:
        assert (is_export, key) not in self._open, f"{key} is under way already"
        opened = _Open(is_export, key, set(range(self._num_ranks)))
        self._open[is_export, key] = opened
        return opened

    def _on_frame(self, frame: bytes) -> None:
        report = decode_report(frame)
        self._silent_s[report.rank] = 0.0
        if isinstance(report, Up):
            self._followers[report.rank] = report.address
            if len(self._followers) == self._num_ranks - 1:
                self._all_up.set()
            return
        self._counts[report.rank] = report.counts
        if isinstance(report, Counted):
            self._staging[report.rank], self._hindrances[report.rank] = report.staging, report.hindrance
            return
        if report.cost is not None:
            self._add_cost(report.is_export, report.key, report.cost)
        error = None if report.error is None else as_transfer_error(report.error)
        self._take(report.rank, report.is_export, report.key, error, report.first_token)

    def _add_cost(self, is_export: bool, key: Key, cost: HandoffCost) -> None:
        """A rank has completed its part, and is about to be counted as done."""
        if (found := self._open.get((is_export, key))) is not None:
            found.cost = found.cost.beside(cost)

    def _take(self, rank: int, is_export: bool, key: Key, error: TransferError | None, first_token: int | None) -> None:
        """`rank` has ended its part."""
        found = self._open.get((is_export, key))
        if found is None:
            if not is_export and error is not None:
                self._drop_offer(rank, key, error)
            return
        if rank not in found.waiting_for:
            return
        found.waiting_for.discard(rank)
        found.first_token = first_token if found.first_token is None else found.first_token
        if error is not None:
            self._stop_others(found, error)
        if not found.waiting_for:
            self._end(found, found.error)
        elif found.deadline is None and (rank == 0 or error is not None):
            # Before, all may wait for the peer's blocks, or for the prompt.
            found.deadline = self._loop.call_later(self._patience_s, self._expire, is_export, key)

    def _drop_offer(self, rank: int, key: Key, error: TransferError) -> None:
        """An offer that was not accepted yet has failed on one rank: it is void on all."""
        if rank == 0:
            self._relay.send(encode(AbortImport(key, error.to_info())))
            self._post(ImportFailed(key, error))
        else:
            self._halves.imports.abort(key, error)

    def _stop_others(self, failed: _Open, error: TransferError) -> None:
        first = failed.error is None
        if failed.error is None or (failed.error.reason == "aborted" and error.reason != "aborted"):
            failed.error = error  # who was only told to stop knows less
        if first and failed.waiting_for:
            abort = (AbortExport if failed.is_export else AbortImport)(failed.key, error.to_info())
            self._relay.send(encode(abort))
            if 0 in failed.waiting_for:
                self._halves.run(abort, None)

    def _end(self, ended: _Open, error: TransferError | None) -> None:
        if self._open.pop((ended.is_export, ended.key), None) is None:
            return  # ended on the way here, by rank 0's own part
        if ended.is_export and not self._exporting:
            self._exports_over.set()
        if ended.deadline is not None:
            ended.deadline.cancel()
        ended.error = error
        self._post(ended.event)

    def _watch(self) -> None:
        """Count each follower's silence, in turns of this loop: time in which it was held up itself counts but once."""
        for rank in self._silent_s:
            self._silent_s[rank] += self._alive_s
            if self._silent_s[rank] > self._patience_s and self._lost is None:
                self.lose(rank, f"it has said nothing for {self._patience_s} s")
        self._watching = self._loop.call_later(self._alive_s, self._watch)

    def _expire(self, is_export: bool, key: Key) -> None:
        for rank in sorted(self._open[is_export, key].waiting_for - {0}):
            self.lose(rank, f"it has not ended {key} within {self._patience_s} s")

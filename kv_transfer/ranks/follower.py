"""A rank after rank 0: does what rank 0's engine asks, in the same order, and reports how each handoff ends.

Life cycle: `join`, in the transceiver's loop, which tells rank 0 where this rank listens → calls, each held back until
this rank's engine has launched the steps that it relies on → `close`.
"""

from __future__ import annotations

import asyncio
from collections import deque

from kv_transfer.environment import Environment, Post
from kv_transfer.halves import Halves
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import (
    Accept,
    Call,
    Computed,
    Counted,
    Ended,
    Finish,
    Up,
    World,
    alive_s,
    decode_call,
    encode,
)
from kv_transfer.ranks.relay import Relay, guarded
from kv_transfer.ranks.steps import Steps
from kv_transfer.staging import StagingUse
from pdserve.handoff import ExportDone, ExportFailed, HandoffEvent, ImportDone, ImportOffered
from pdserve.protocol import KvRank, TransferCounts

COUNT_S = 0.1
"""How often a follower tells what its staging is used for, while it is; else it does so every `alive_s`."""


class Follower:
    """`Ranks` of a rank after 0. `steps.launched()` is the engine's to call, after each step."""

    accepts_early = True
    hindrance_of_others = ""

    def __init__(self, relay: Relay, rank: int) -> None:
        assert rank > 0, "rank 0 leads"
        self.rank = rank
        self.steps = Steps()
        self._relay = relay
        self._held: deque[Call] = deque()
        self._counting: asyncio.TimerHandle | None = None
        self._counts_soon = False

    async def join(self, halves: Halves, env: Environment, post: Post, own: KvRank) -> tuple[KvRank, ...]:
        """Tell rank 0 where this rank is; returns that, as the whole world is not known yet."""
        self._halves, self._counts, self._network = halves, env.counters.snapshot, env.network
        self._loop, self._alive_s = asyncio.get_running_loop(), alive_s(env.timeout_s)
        self.steps.on_launched = self._on_launched
        self._relay.start(guarded(self._on_frame, env.fail))
        self._relay.send(encode(Up(self.rank, own)))
        self._count_soon()
        return (own,)

    def handle(self, call: Call, mark: Mark) -> None:
        """This rank's own engine says which layers are computed."""
        self._halves.run(call, mark)

    def on_event(self, event: HandoffEvent) -> None:
        if isinstance(event, ImportOffered):
            return  # rank 0 has its own offer, and decides for all
        is_export = isinstance(event, ExportDone | ExportFailed)
        first_token = event.first_token if isinstance(event, ImportDone) else None
        error = None if isinstance(event, ExportDone | ImportDone) else event.error.to_info()
        cost = event.cost if isinstance(event, ExportDone | ImportDone) else None
        self._relay.send(encode(Ended(self.rank, is_export, event.key, error, first_token, self._counts(), cost)))
        self._count_soon()

    def merge(self, counts: list[TransferCounts]) -> list[TransferCounts]:
        return counts

    @property
    def staging_of_others(self) -> StagingUse:
        return StagingUse()

    async def close(self) -> None:
        if self._counting is not None:
            self._counting.cancel()
        self._relay.close()

    def _on_frame(self, frame: bytes) -> None:
        message = decode_call(frame)
        if isinstance(message, World):
            self._halves.meet(message.ranks, self.rank)
        else:
            self._held.append(message)
            self._run_held()
            self._count_soon()

    def _on_launched(self) -> None:
        if self._held:
            self._loop.call_soon_threadsafe(self._run_held)

    def _run_held(self) -> None:
        # Steps only grow from call to call: nothing that could be done waits behind something that can't.
        while self._held and _step_of(self._held[0]) <= self.steps.count:
            call = self._held.popleft()
            self._halves.run(call, self.steps.mark_of(_step_of(call)))

    def _count_soon(self) -> None:
        if self._counts_soon:
            return
        if self._counting is not None:
            self._counting.cancel()
        self._counts_soon = True
        self._counting = self._loop.call_later(COUNT_S, self._count)

    def _count(self) -> None:
        counts, staging = self._counts(), self._halves.staging_use
        self._relay.send(encode(Counted(self.rank, counts, staging, self._network.hindrance)))
        self._counts_soon = bool(staging.in_use_bytes) or any(each.in_flight for each in counts)
        self._counting = self._loop.call_later(COUNT_S if self._counts_soon else self._alive_s, self._count)


def _step_of(call: Call) -> int:
    return call.step if isinstance(call, Computed | Finish | Accept) else 0

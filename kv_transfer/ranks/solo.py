"""What the transceiver asks of the ranks it belongs to, and the answer of a worker that has but one."""

from __future__ import annotations

from typing import Protocol

from kv_transfer.environment import Environment, Post
from kv_transfer.halves import Halves
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import Call
from kv_transfer.ranks.steps import Steps
from kv_transfer.staging import StagingUse
from pdserve.handoff import HandoffEvent
from pdserve.protocol import KvRank, TransferCounts


class Ranks(Protocol):
    """One rank's place among those of its worker. All but `steps`, `merge` and what is `of_others` belongs to the
    transceiver's loop."""

    rank: int
    accepts_early: bool
    steps: Steps

    async def join(self, halves: Halves, env: Environment, post: Post, own: KvRank) -> tuple[KvRank, ...]:
        """This rank listens at `own`; returns all ranks that are known. Called once, first."""
        ...

    def handle(self, call: Call, mark: Mark) -> None:
        """The engine of this rank asks for something."""

    def on_event(self, event: HandoffEvent) -> None:
        """This rank's sender or receiver has something to say."""

    def merge(self, counts: list[TransferCounts]) -> list[TransferCounts]:
        """What the worker has moved, where this rank has moved `counts`. From any thread."""
        ...

    @property
    def staging_of_others(self) -> StagingUse:
        """What the worker's other ranks hold, as far as this one knows. From any thread."""
        ...

    @property
    def hindrance_of_others(self) -> str:
        """Why one of them can make no links for the moment; empty when all can. From any thread."""
        ...

    async def close(self) -> None: ...


class Solo:
    """A worker of one rank: calls and events go straight through."""

    rank = 0
    accepts_early = False
    hindrance_of_others = ""

    def __init__(self) -> None:
        self.steps = Steps()

    async def join(self, halves: Halves, env: Environment, post: Post, own: KvRank) -> tuple[KvRank, ...]:
        self._halves, self._post = halves, post
        return (own,)

    def handle(self, call: Call, mark: Mark) -> None:
        self._halves.run(call, mark)

    def on_event(self, event: HandoffEvent) -> None:
        self._post(event)

    def merge(self, counts: list[TransferCounts]) -> list[TransferCounts]:
        return counts

    @property
    def staging_of_others(self) -> StagingUse:
        return StagingUse()

    async def close(self) -> None:
        pass

"""Staging memory: a fixed number of equal slots, handed out in turn to whoever has a message for one.

Owns the memory and the queue, not what is in a slot. Life of a slot: free → taken by a client → `release` by that
client, once nothing reads or writes it any more. Used by one event loop only; the counts may be read from anywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kv_transfer.plan import StagingPlan


class StagingUse(NamedTuple):
    """Bytes of staging memory, and those of them that somebody holds."""

    total_bytes: int = 0
    in_use_bytes: int = 0

    @staticmethod
    def of_all(uses: Iterable[StagingUse]) -> StagingUse:
        """Added up."""
        return StagingUse(*(sum(column) for column in zip(StagingUse(), *uses, strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """`memory` is uint8 `[slot_bytes]`, contiguous, on the pool's device."""

    memory: Tensor


class SlotClient(Protocol):
    """A handoff that needs slots."""

    @property
    def wants_slot(self) -> bool: ...

    def take(self, slot: Slot) -> None:
        """Use `slot` for one message; called only while `wants_slot`. Must not raise."""


READS_AT_ONCE = 4
"""Reads of other pools that are launched at a time: enough to keep the link busy, few enough to be fair."""


class Staging:
    """`plan.num_slots` slots of `plan.slot_blocks` blocks. Memory is allocated at once, and touched when first used.

    With `later`, which calls back in the loop's next turn, slots are given out one a turn: packing a message keeps the
    thread busy, and the one before may be ready to be sent meanwhile.
    """

    def __init__(
        self,
        plan: StagingPlan,
        block_bytes: int,
        device: torch.device,
        later: Callable[[Callable[[], None]], object] | None = None,
    ) -> None:
        self.slot_bytes = plan.slot_blocks * block_bytes
        self.total_bytes = plan.num_slots * self.slot_bytes
        memory = torch.empty(plan.num_slots, self.slot_bytes, dtype=torch.uint8, device=device)
        self._free = [Slot(row) for row in memory]
        self._waiting: OrderedDict[SlotClient, None] = OrderedDict()
        self._num_slots = plan.num_slots
        self._dispatching = False
        self._later = later

    @property
    def in_use_bytes(self) -> int:
        return (self._num_slots - len(self._free)) * self.slot_bytes

    @property
    def use(self) -> StagingUse:
        return StagingUse(self.total_bytes, self.in_use_bytes)

    def scratch(self, nbytes: int) -> Tensor:
        """The start of a slot; only before any client has been given one."""
        assert len(self._free) == self._num_slots, "staging is in use"
        return self._free[0].memory[:nbytes]

    def take_spare(self) -> Slot | None:
        """A slot for a message that is not due yet, if that leaves half of all for those that are."""
        if self._waiting or 2 * (len(self._free) - 1) < self._num_slots:
            return None
        return self._free.pop()

    def request(self, client: SlotClient) -> None:
        """Queue `client` behind those that wait; it gets one slot a turn until it wants no more."""
        self._waiting.setdefault(client)
        self._dispatch()

    def withdraw(self, client: SlotClient) -> None:
        """Take `client` out of the queue; slots it holds stay its own."""
        self._waiting.pop(client, None)

    def release(self, slot: Slot) -> None:
        self._free.append(slot)
        self._dispatch()

    def _dispatch(self) -> None:
        if self._dispatching:
            return
        self._dispatching, goes_on_later = True, False
        try:
            while self._free and self._waiting and not goes_on_later:
                client, _ = self._waiting.popitem(last=False)
                if client.wants_slot:
                    client.take(self._free.pop())
                    if client.wants_slot:
                        self._waiting.setdefault(client)
                    if self._later is not None:
                        self._later(self._go_on)
                        goes_on_later = True
        finally:
            self._dispatching = goes_on_later

    def _go_on(self) -> None:
        self._dispatching = False
        self._dispatch()


def new_turns(later: Callable[[Callable[[], None]], object]) -> Staging:
    """Turns at reading other pools: slots without memory. They are not staging's, which a peer that sends nothing any
    more may hold for longer than a piece stays readable."""
    return Staging(StagingPlan(slot_blocks=0, num_slots=READS_AT_ONCE), 0, torch.device("cpu"), later)

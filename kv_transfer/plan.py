"""Which blocks go when, in which message, and how large staging is. Arithmetic only, no state but a cursor.

A message carries whole blocks, with all their layers, in the order of the sequence.
"""

from __future__ import annotations

from typing import NamedTuple

CUDA_MESSAGE_BYTES = 64 << 20
"""Largest message between GPUs. Each costs some 100 µs of Python on either side: 1 GiB in one handoff between two H200
took 6.2 ms in messages of 32 MiB, 4.4 ms in messages of 64 MiB, and no less in larger ones."""

CPU_MESSAGE_BYTES = 4 << 20
"""Largest message between host pools: small enough that packing, sending and unpacking overlap."""

IN_FLIGHT = 4
"""Messages that should fit into staging at once, where blocks are small enough."""

MAX_IN_FLIGHT = 8
"""Messages of one handoff at a time: more would not be quicker, and would make the others wait."""


class BlockRange(NamedTuple):
    """Blocks `first` to `first + size` of a sequence (indices into its block list, not block ids)."""

    first: int
    size: int


class StagingPlan(NamedTuple):
    slot_blocks: int
    num_slots: int


def num_blocks(num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // tokens_per_block)


def pushable_blocks(computed_tokens: int, num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that won't change any more: the whole ones, and the partial last one once every token is computed."""
    if computed_tokens >= num_tokens:
        return num_blocks(num_tokens, tokens_per_block)
    return computed_tokens // tokens_per_block


def plan_staging(max_tokens: int, tokens_per_block: int, block_bytes: int, message_bytes: int) -> StagingPlan:
    """Slots that fit into `max_tokens` tokens' worth of memory, and at least one of one block.

    A slot holds as many blocks as `message_bytes` allows, fewer where that leaves room for `IN_FLIGHT` slots.
    """
    total_blocks = max(1, max_tokens // tokens_per_block)
    slot_blocks = max(1, min(message_bytes // block_bytes, total_blocks // IN_FLIGHT))
    return StagingPlan(slot_blocks, total_blocks // slot_blocks)


class Cursor:
    """Walks a sequence's blocks, from the first that must be sent, message by message, as they become ready."""

    def __init__(self, first: int, end: int) -> None:
        self.next = first
        self.end = end
        self.ready = 0

    def advance(self, ready_blocks: int) -> None:
        """The first `ready_blocks` blocks of the sequence may be sent; never moves back."""
        self.ready = max(self.ready, min(ready_blocks, self.end))

    @property
    def has_next(self) -> bool:
        return self.next < self.ready

    def take(self, max_blocks: int) -> BlockRange:
        """The next message's blocks; only when `has_next`."""
        assert self.has_next, "a message needs a block that is ready"
        message = BlockRange(self.next, min(max_blocks, self.ready - self.next))
        self.next += message.size
        return message

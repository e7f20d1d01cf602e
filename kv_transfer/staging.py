"""Staging memory: a fixed number of equal buffers, each of which holds a message on its way out or in.

Shares take buffers in turns. Owns the memory and the queue of those that wait. A buffer's content belongs to the share
that took it, until the share releases it; by then nothing may read or write it any more. Used by one event loop only;
the counts may be read from any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kv_transfer.layout import KvPoolView
from kv_transfer.turns import Later, Turns

CUDA_MESSAGE_BYTES = 64 << 20
"""Largest message between GPUs. Each costs some 80 µs of Python on either side: 1 GiB between two H200 took 3.6 to
5.1 ms in messages of 32 MiB, 3.4 ms in messages of 64 MiB."""

CPU_MESSAGE_BYTES = 4 << 20
"""Largest message between host pools: small enough that packing, sending and unpacking overlap."""

IN_FLIGHT = 4
"""Messages that should fit into staging at once, where blocks are small enough."""


BUFFER_ALIGNMENT = 16


class StagingUse(NamedTuple):
    """Bytes of staging memory, and of buffers that are taken."""

    total_bytes: int = 0
    in_use_bytes: int = 0

    @staticmethod
    def of_all(uses: Iterable[StagingUse]) -> StagingUse:
        """Added up."""
        return StagingUse(*(sum(column) for column in zip(StagingUse(), *uses, strict=True)))


class StagingSize(NamedTuple):
    buffer_blocks: int
    num_buffers: int


def staging_size(max_tokens: int, tokens_per_block: int, block_bytes: int, message_bytes: int) -> StagingSize:
    """Buffers that fit into `max_tokens` tokens' worth of memory, and at least one of one block.

    A buffer holds as many blocks as `message_bytes` allows, fewer where that leaves room for `IN_FLIGHT` buffers.
    """
    return _cut(max(1, max_tokens // tokens_per_block), block_bytes, message_bytes)


def size_for(pool: KvPoolView, max_tokens: int) -> StagingSize:
    """The staging of a transceiver over `pool` that may hold `max_tokens` tokens, in blocks of `largest_block`."""
    message_bytes = CUDA_MESSAGE_BYTES if pool.is_cuda else CPU_MESSAGE_BYTES
    all_bytes = sum(max_tokens // group.layout.tokens_per_block * group.block_bytes for group in pool.groups)
    block_bytes = largest_block(pool)
    return _cut(max(1, all_bytes // block_bytes), block_bytes, message_bytes)


def largest_block(pool: KvPoolView) -> int:
    """Bytes of the largest block of any group; a few more where there are several, so that buffers suit every type."""
    found = max(group.block_bytes for group in pool.groups)
    return found if len(pool.groups) == 1 else -(-found // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def _cut(total_blocks: int, block_bytes: int, message_bytes: int) -> StagingSize:
    buffer_blocks = max(1, min(message_bytes // block_bytes, total_blocks // IN_FLIGHT))
    return StagingSize(buffer_blocks, total_blocks // buffer_blocks)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """`memory` is uint8 `[buffer_bytes]`, contiguous, on the pool's device."""

    memory: Tensor


class Staging(Turns[Buffer]):
    """`size.num_buffers` buffers of `size.buffer_blocks` blocks, allocated at once and touched when first used."""

    def __init__(self, size: StagingSize, block_bytes: int, device: torch.device, later: Later | None = None) -> None:
        self.buffer_bytes = size.buffer_blocks * block_bytes
        self.total_bytes = size.num_buffers * self.buffer_bytes
        memory = torch.empty(size.num_buffers, self.buffer_bytes, dtype=torch.uint8, device=device)
        super().__init__((Buffer(row) for row in memory), later)

    @property
    def in_use_bytes(self) -> int:
        return self.num_taken * self.buffer_bytes

    @property
    def use(self) -> StagingUse:
        return StagingUse(self.total_bytes, self.in_use_bytes)

    def scratch(self, nbytes: int) -> Tensor:
        """The start of a buffer; only before any client has been given one."""
        assert not self.num_taken, "staging is in use"
        return self._free[0].memory[:nbytes]

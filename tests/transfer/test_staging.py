"""Buffers go round: one each turn, none twice, none lost; and they fit their bound."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.staging import (
    CPU_MESSAGE_BYTES,
    CUDA_MESSAGE_BYTES,
    IN_FLIGHT,
    Buffer,
    Staging,
    StagingSize,
    staging_size,
)


class Client:
    def __init__(self, wants: int) -> None:
        self.wants = wants
        self.buffers: list[Buffer] = []

    @property
    def wants_turn(self) -> bool:
        return self.wants > 0

    def take(self, buffer: Buffer) -> None:
        self.wants -= 1
        self.buffers.append(buffer)


def staging(num_buffers: int) -> Staging:
    return Staging(StagingSize(2, num_buffers), 8, torch.device("cpu"))


def test_slots_are_disjoint_and_counted() -> None:
    pool, client = staging(3), Client(5)
    pool.request(client)
    assert len({buffer.memory.data_ptr() for buffer in client.buffers}) == 3
    assert all(buffer.memory.numel() == 16 for buffer in client.buffers)
    assert pool.in_use_bytes == pool.total_bytes == 48


def test_a_long_handoff_does_not_hold_a_short_one_back() -> None:
    pool, long, short = staging(2), Client(100), Client(1)
    pool.request(long)
    pool.request(short)
    for turn in range(2):
        pool.release(long.buffers[turn])
    assert len(short.buffers) == 1


def test_a_client_that_withdrew_gets_nothing_more() -> None:
    pool, first, second = staging(1), Client(2), Client(1)
    pool.request(first)
    pool.request(second)
    pool.withdraw(first)
    pool.release(first.buffers[0])
    assert len(first.buffers) == 1
    assert len(second.buffers) == 1
    pool.release(second.buffers[0])
    assert pool.in_use_bytes == 0


def test_slots_to_spare_leave_half_for_what_is_due() -> None:
    pool = staging(5)
    taken = [pool.take_spare() for _ in range(3)]
    assert [buffer is not None for buffer in taken] == [True, True, False]
    client = Client(4)
    pool.request(client)
    assert len(client.buffers) == 3
    pool.release(client.buffers[0])
    assert pool.take_spare() is None
    assert staging(1).take_spare() is None


@given(
    max_tokens=st.integers(1, 1 << 20),
    tokens_per_block=st.integers(1, 1024),
    block_bytes=st.integers(1, 1 << 27),
    message_bytes=st.sampled_from([CPU_MESSAGE_BYTES, CUDA_MESSAGE_BYTES]),
)
def test_staging_keeps_its_bound_and_always_holds_a_block(
    max_tokens: int, tokens_per_block: int, block_bytes: int, message_bytes: int
) -> None:
    buffer_blocks, num_buffers = staging_size(max_tokens, tokens_per_block, block_bytes, message_bytes)
    assert buffer_blocks >= 1
    assert num_buffers >= 1
    assert buffer_blocks * num_buffers <= max(1, max_tokens // tokens_per_block)
    assert buffer_blocks == 1 or buffer_blocks * block_bytes <= message_bytes
    assert num_buffers >= min(IN_FLIGHT, max(1, max_tokens // tokens_per_block))

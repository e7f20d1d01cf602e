"""Slots go round: one each turn, none twice, none lost; and they fit their bound."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.staging import (
    CPU_MESSAGE_BYTES,
    CUDA_MESSAGE_BYTES,
    IN_FLIGHT,
    Slot,
    Staging,
    StagingSize,
    staging_size,
)


class Client:
    def __init__(self, wants: int) -> None:
        self.wants = wants
        self.slots: list[Slot] = []

    @property
    def wants_turn(self) -> bool:
        return self.wants > 0

    def take(self, slot: Slot) -> None:
        self.wants -= 1
        self.slots.append(slot)


def staging(num_slots: int) -> Staging:
    return Staging(StagingSize(2, num_slots), 8, torch.device("cpu"))


def test_slots_are_disjoint_and_counted() -> None:
    pool, client = staging(3), Client(5)
    pool.request(client)
    assert len({slot.memory.data_ptr() for slot in client.slots}) == 3
    assert all(slot.memory.numel() == 16 for slot in client.slots)
    assert pool.in_use_bytes == pool.total_bytes == 48


def test_a_long_handoff_does_not_hold_a_short_one_back() -> None:
    pool, long, short = staging(2), Client(100), Client(1)
    pool.request(long)
    pool.request(short)
    for turn in range(2):
        pool.release(long.slots[turn])
    assert len(short.slots) == 1


def test_a_client_that_withdrew_gets_nothing_more() -> None:
    pool, first, second = staging(1), Client(2), Client(1)
    pool.request(first)
    pool.request(second)
    pool.withdraw(first)
    pool.release(first.slots[0])
    assert len(first.slots) == 1
    assert len(second.slots) == 1
    pool.release(second.slots[0])
    assert pool.in_use_bytes == 0


def test_slots_to_spare_leave_half_for_what_is_due() -> None:
    pool = staging(5)
    taken = [pool.take_spare() for _ in range(3)]
    assert [slot is not None for slot in taken] == [True, True, False]
    client = Client(4)
    pool.request(client)
    assert len(client.slots) == 3
    pool.release(client.slots[0])
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
    slot_blocks, num_slots = staging_size(max_tokens, tokens_per_block, block_bytes, message_bytes)
    assert slot_blocks >= 1
    assert num_slots >= 1
    assert slot_blocks * num_slots <= max(1, max_tokens // tokens_per_block)
    assert slot_blocks == 1 or slot_blocks * block_bytes <= message_bytes
    assert num_slots >= min(IN_FLIGHT, max(1, max_tokens // tokens_per_block))

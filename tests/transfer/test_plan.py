"""Every block that is ready is sent exactly once, in messages that fit their slots, in slots that fit their bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import plan


@given(
    num_tokens=st.integers(1, 2000),
    tokens_per_block=st.integers(1, 64),
    chunks=st.lists(st.integers(0, 2000), max_size=8),
    first=st.integers(0, 40),
    slot_blocks=st.integers(1, 9),
)
def test_messages_cover_each_block_once(
    num_tokens: int, tokens_per_block: int, chunks: list[int], first: int, slot_blocks: int
) -> None:
    end = plan.num_blocks(num_tokens, tokens_per_block)
    first = min(first, end)
    cursor = plan.Cursor(first, end)
    sent: list[int] = []
    for computed in [*sorted(chunks), num_tokens]:
        ready = plan.pushable_blocks(computed, num_tokens, tokens_per_block)
        cursor.advance(ready)
        while cursor.has_next:
            message = cursor.take(slot_blocks)
            assert 1 <= message.size <= slot_blocks
            sent += range(message.first, message.first + message.size)
            assert sent[-1] < ready
    assert sent == list(range(first, end))


@given(computed=st.integers(0, 500), num_tokens=st.integers(1, 500), tokens_per_block=st.integers(1, 40))
def test_a_block_is_pushed_only_when_all_its_tokens_are_computed(
    computed: int, num_tokens: int, tokens_per_block: int
) -> None:
    ready = plan.pushable_blocks(computed, num_tokens, tokens_per_block)
    assert ready <= plan.num_blocks(num_tokens, tokens_per_block)
    assert min(ready * tokens_per_block, num_tokens) <= computed


@given(
    max_tokens=st.integers(1, 1 << 20),
    tokens_per_block=st.integers(1, 1024),
    block_bytes=st.integers(1, 1 << 27),
    message_bytes=st.sampled_from([plan.CPU_MESSAGE_BYTES, plan.CUDA_MESSAGE_BYTES]),
)
def test_staging_keeps_its_bound_and_always_holds_a_block(
    max_tokens: int, tokens_per_block: int, block_bytes: int, message_bytes: int
) -> None:
    slot_blocks, num_slots = plan.plan_staging(max_tokens, tokens_per_block, block_bytes, message_bytes)
    assert slot_blocks >= 1
    assert num_slots >= 1
    assert slot_blocks * num_slots <= max(1, max_tokens // tokens_per_block)
    assert slot_blocks == 1 or slot_blocks * block_bytes <= message_bytes
    assert num_slots >= min(plan.IN_FLIGHT, max(1, max_tokens // tokens_per_block))

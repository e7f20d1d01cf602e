"""The block books: states, sharing, eviction order, and what no sequence of calls may break."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine.block_manager import BlockManager, BrokenInvariant
from pdserve.engine.prefix_cache import BlockHashes
from pdserve.protocol import BlockCounts

WIDTH = 2


def hashes(*token_ids: int, salt: str = "") -> BlockHashes:
    return BlockHashes(list(token_ids), WIDTH, salt)


def fill(blocks: BlockManager, *token_ids: int, salt: str = "") -> list[int]:
    """Allocate, register and release the blocks of `token_ids`; returns the table they had."""
    table = blocks.allocate(len(token_ids) // WIDTH)
    assert table is not None
    blocks.register(hashes(*token_ids, salt=salt), table, 0, len(table))
    blocks.release(table)
    return table


def test_a_block_passes_through_its_states() -> None:
    blocks = BlockManager(4, WIDTH)
    assert blocks.counts() == BlockCounts(total=4, free=4)
    table = blocks.allocate(3, reserved=True)
    assert table is not None
    assert blocks.counts() == BlockCounts(total=4, free=1, reserved=3)
    blocks.commit(table)
    assert blocks.counts() == BlockCounts(total=4, free=1, used=3)
    blocks.register(hashes(1, 2, 3, 4), table, 0, 2)
    blocks.release(table)
    assert blocks.counts() == BlockCounts(total=4, free=2, cached=2)
    blocks.check([])


def test_a_prefix_is_found_up_to_the_first_difference() -> None:
    blocks = BlockManager(8, WIDTH)
    table = fill(blocks, 1, 2, 3, 4, 5, 6)
    assert blocks.match_prefix(hashes(1, 2, 3, 4, 5, 6), 3) == table
    assert blocks.match_prefix(hashes(1, 2, 3, 4, 5, 6), 2) == table[:2]
    assert blocks.match_prefix(hashes(1, 2, 9, 4, 5, 6), 3) == table[:1]
    assert blocks.match_prefix(hashes(3, 4, 5, 6), 2) == []


def test_another_salt_shares_nothing() -> None:
    blocks = BlockManager(8, WIDTH)
    fill(blocks, 1, 2, 3, 4, salt="a")
    assert blocks.match_prefix(hashes(1, 2, 3, 4, salt="b"), 2) == []
    assert blocks.match_prefix(hashes(1, 2, 3, 4), 2) == []
    assert len(blocks.match_prefix(hashes(1, 2, 3, 4, salt="a"), 2)) == 2


def test_digests_follow_a_growing_history() -> None:
    token_ids = [1, 2, 3]
    growing = BlockHashes(token_ids, WIDTH)
    first = growing.digest(0)
    with pytest.raises(AssertionError, match="full block"):
        growing.digest(1)
    token_ids += [4]
    assert growing.digest(0) == first
    assert growing.digest(1) == hashes(1, 2, 3, 4).digest(1) != hashes(3, 4).digest(0)


def test_shared_blocks_stay_until_their_last_user_leaves() -> None:
    blocks = BlockManager(4, WIDTH)
    first = fill(blocks, 1, 2, 3, 4)
    a = blocks.allocate(1, shared=first)
    b = blocks.allocate(1, shared=first)
    assert a is not None
    assert b is not None
    assert a[:2] == b[:2] == first
    assert blocks.counts() == BlockCounts(total=4, used=4)
    blocks.check([a, b])
    blocks.release(a)
    assert blocks.counts() == BlockCounts(total=4, free=1, used=3)
    blocks.check([b])


def test_the_least_recently_used_prefix_is_evicted_first_and_its_tail_before_its_head() -> None:
    blocks = BlockManager(4, WIDTH)
    old, new = fill(blocks, 1, 2, 3, 4), fill(blocks, 5, 6, 7, 8)
    touched = blocks.allocate(0, shared=old)
    assert touched is not None
    blocks.release(touched)
    assert blocks.allocate(1) == [new[1]]
    assert blocks.match_prefix(hashes(5, 6, 7, 8), 2) == new[:1]
    assert blocks.match_prefix(hashes(1, 2, 3, 4), 2) == old


def test_an_allocation_never_takes_the_blocks_it_shares() -> None:
    blocks = BlockManager(3, WIDTH)
    cached = fill(blocks, 1, 2, 3, 4)
    assert blocks.available == 3
    assert blocks.allocate(2, shared=cached) is None
    table = blocks.allocate(1, shared=cached)
    assert table is not None
    assert len(set(table)) == 3


def test_headroom_is_left() -> None:
    blocks = BlockManager(4, WIDTH)
    assert blocks.allocate(3, headroom=2) is None
    assert blocks.allocate(2, headroom=2) is not None


def test_without_reuse_nothing_is_cached() -> None:
    blocks = BlockManager(4, WIDTH, enable_block_reuse=False)
    fill(blocks, 1, 2, 3, 4)
    assert blocks.match_prefix(hashes(1, 2, 3, 4), 2) == []
    assert blocks.counts() == BlockCounts(total=4, free=4)


def test_check_finds_a_leak_and_a_double_release() -> None:
    blocks = BlockManager(4, WIDTH)
    table = blocks.allocate(2)
    assert table is not None
    with pytest.raises(BrokenInvariant, match="users"):
        blocks.check([])
    blocks.release(table)
    with pytest.raises(BrokenInvariant, match="released by more"):
        blocks.release(table)


class Books(RuleBasedStateMachine):
    """Tables come, grow, are registered and go; contents are remembered by the test itself."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, WIDTH)
        self.tables: list[tuple[list[int], list[int], bool]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=10), reserved=st.booleans())
    def allocate(self, tokens: list[int], reserved: bool) -> None:
        available = self.blocks.available
        shared = self.blocks.match_prefix(BlockHashes(tokens, WIDTH), (len(tokens) - 1) // WIDTH)
        for index, block_id in enumerate(shared):
            assert self.content[block_id] == tuple(tokens[: (index + 1) * WIDTH]), "a match of another prefix"
        fresh = self.blocks.blocks_for(len(tokens)) - len(shared)
        table = self.blocks.allocate(fresh, shared=shared, reserved=reserved)
        if table is None:
            assert self.blocks.available == available
            return
        for block_id in table[len(shared) :]:
            self.content.pop(block_id, None)
        self.tables.append((tokens, table, reserved))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        tokens, table, _ = self.tables[index]
        self.blocks.commit(table)
        self.tables[index] = (tokens, table, False)
        full = len(tokens) // WIDTH
        for number, block_id in enumerate(table[:full]):
            self.content[block_id] = tuple(tokens[: (number + 1) * WIDTH])
        self.blocks.register(BlockHashes(tokens, WIDTH), table, 0, full)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        tokens, table, _ = self.tables[data.draw(st.integers(0, len(self.tables) - 1))]
        available = self.blocks.available
        assert self.blocks.extend(table) == (available > 0)
        if available:
            self.content.pop(table[-1], None)
            tokens += [0] * (len(table) * WIDTH - WIDTH + 1 - len(tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        _, table, _ = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.blocks.release(table)

    @invariant()
    def the_books_agree(self) -> None:
        self.blocks.check([table for _, table, _ in self.tables])
        counts = self.blocks.counts()
        assert counts.free + counts.cached + counts.used + counts.reserved == counts.total == 12

    def teardown(self) -> None:
        for _, table, _ in self.tables:
            self.blocks.release(table)
        self.blocks.check([])
        assert self.blocks.available == 12


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=80, stateful_step_count=40, deadline=None, derandomize=True)

"""The block books: states, sharing, eviction order, and what no sequence of calls may break."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.block_manager import BlockManager, BrokenInvariant
from pdserve.engine.schedule.prefix_cache import BlockHashes, Match
from pdserve.protocol import BlockCounts

WIDTH = 2
WIDE = 3


def hashes(*token_ids: int, salt: str = "") -> BlockHashes:
    return BlockHashes(list(token_ids), WIDTH, (salt,))


def fill(blocks: BlockManager, *token_ids: int, salt: str = "") -> list[int]:
    """Allocate, register and release the blocks of `token_ids`; returns the table they had."""
    table = blocks.allocate(len(token_ids) // WIDTH)
    assert table is not None
    blocks.register(hashes(*token_ids, salt=salt), table, 0, len(table))
    blocks.release(table)
    return table


def shared(blocks: BlockManager, *token_ids: int, salt: str = "") -> list[int]:
    """Blocks that hold the beginning of `token_ids`."""
    return list(blocks.match(hashes(*token_ids, salt=salt), len(token_ids)).shared)


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
    assert shared(blocks, 1, 2, 3, 4, 5, 6) == table
    assert shared(blocks, 1, 2, 3, 4, 5) == table[:2]
    assert shared(blocks, 1, 2, 9, 4, 5, 6) == table[:1]
    assert shared(blocks, 3, 4, 5, 6) == []


def test_another_salt_shares_nothing() -> None:
    blocks = BlockManager(8, WIDTH)
    fill(blocks, 1, 2, 3, 4, salt="a")
    assert shared(blocks, 1, 2, 3, 4, salt="b") == []
    assert shared(blocks, 1, 2, 3, 4) == []
    assert len(shared(blocks, 1, 2, 3, 4, salt="a")) == 2


def test_digests_follow_a_growing_history() -> None:
    token_ids = [1, 2, 3]
    growing = BlockHashes(token_ids, WIDTH, ("",))
    first = growing.digest(0)
    with pytest.raises(AssertionError, match="full block"):
        growing.digest(1)
    token_ids += [4]
    assert growing.digest(0) == first
    assert growing.digest(1) == hashes(1, 2, 3, 4).digest(1) != hashes(3, 4).digest(0)


def test_shared_blocks_stay_until_their_last_user_leaves() -> None:
    blocks = BlockManager(4, WIDTH)
    first = fill(blocks, 1, 2, 3, 4)
    a = blocks.allocate(3, Match(tuple(first)))
    b = blocks.allocate(3, Match(tuple(first)))
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
    touched = blocks.allocate(2, Match(tuple(old)))
    assert touched is not None
    blocks.release(touched)
    assert blocks.allocate(1) == [new[1]]
    assert shared(blocks, 5, 6, 7, 8) == new[:1]
    assert shared(blocks, 1, 2, 3, 4) == old


def test_an_allocation_never_takes_the_blocks_it_shares() -> None:
    blocks = BlockManager(3, WIDTH)
    cached = fill(blocks, 1, 2, 3, 4)
    assert blocks.available == 3
    assert blocks.allocate(4, Match(tuple(cached))) is None
    table = blocks.allocate(3, Match(tuple(cached)))
    assert table is not None
    assert len(set(table)) == 3


def test_headroom_is_left() -> None:
    blocks = BlockManager(4, WIDTH)
    assert blocks.allocate(3, headroom=2) is None
    assert blocks.allocate(2, headroom=2) is not None


def test_without_reuse_nothing_is_cached() -> None:
    blocks = BlockManager(4, WIDTH, enable_block_reuse=False)
    fill(blocks, 1, 2, 3, 4)
    assert shared(blocks, 1, 2, 3, 4) == []
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


def test_a_block_that_differs_only_in_its_tail_is_copied_and_stays() -> None:
    blocks = BlockManager(4, 4)
    known = BlockHashes([1, 2, 3, 4, 5, 6, 7, 8], 4)
    table = blocks.allocate(2)
    assert table is not None
    blocks.register(known, table, 0, 2)
    match = blocks.match(BlockHashes([1, 2, 3, 4, 5, 6, 9, 9], 4), 7)
    assert match == Match((table[0],), (), table[1], 2)
    mine = blocks.allocate(2, match)
    assert mine is not None
    assert blocks.take_copies() == [BlockCopy("duplicate", table[1], mine[1])]
    assert blocks.take_copies() == []
    assert mine[0] == table[0]
    blocks.check([table, mine])
    assert blocks.match(known, 8).shared == tuple(table)


def test_the_last_token_of_a_whole_block_can_be_left_out() -> None:
    blocks = BlockManager(4, WIDTH)
    table = fill(blocks, 1, 2, 3, 4)
    assert blocks.match(hashes(1, 2, 3, 4), 3) == Match((table[0],), (), table[1], 1)
    assert blocks.match(hashes(1, 2, 3, 4), 3, only_whole_blocks=True) == Match((table[0],))


def test_without_copying_only_an_idle_block_is_taken_and_loses_its_name() -> None:
    blocks = BlockManager(4, WIDTH, copy_on_partial_reuse=False)
    table = fill(blocks, 1, 2, 3, 4)
    user = blocks.allocate(2, Match(tuple(table)))
    assert user is not None
    assert blocks.match(hashes(1, 2, 3, 9), 4).num_partial_tokens == 0
    blocks.release(user)
    mine = blocks.allocate(2, blocks.match(hashes(1, 2, 3, 9), 4))
    assert mine == table
    assert blocks.take_copies() == []
    assert shared(blocks, 1, 2, 3, 4) == table[:1]
    blocks.check([mine])


def test_the_tail_of_an_ended_sequence_is_found_and_evicted_first() -> None:
    blocks = BlockManager(3, 4)
    known = BlockHashes([1, 2, 3, 4, 5, 6], 4)
    table = blocks.allocate(2)
    assert table is not None
    blocks.register(known, table, 0, 1)
    blocks.register_tail(known, table, 6)
    blocks.release(table)
    assert blocks.counts().cached == 2
    longer = BlockHashes([1, 2, 3, 4, 5, 6, 7, 8, 9], 4)
    assert blocks.match(longer, 8) == Match((table[0],), (), table[1], 2)
    blocks.check([])
    assert blocks.allocate(2) is not None
    assert blocks.match(longer, 8) == Match((table[0],))


def test_a_partial_match_is_never_evicted_for_its_own_copy() -> None:
    blocks = BlockManager(2, WIDTH)
    table = fill(blocks, 1, 2, 3, 4)
    match = blocks.match(hashes(1, 2, 3, 9), 4)
    assert match.num_partial_tokens == 1
    assert blocks.allocate(2, match) is None
    assert blocks.allocate(2, match.whole_blocks()) == table


def test_an_evicted_block_comes_back_from_the_host() -> None:
    blocks = BlockManager(2, WIDTH, num_host_blocks=2)
    table = fill(blocks, 1, 2, 3, 4)
    other = blocks.allocate(2)
    assert other is not None
    assert blocks.take_copies() == [BlockCopy("offload", table[1], 0), BlockCopy("offload", table[0], 1)]
    blocks.release(other)
    match = blocks.match(hashes(1, 2, 3, 4), 4)
    assert match == Match((), (1, 0))
    mine = blocks.allocate(2, match)
    assert mine is not None
    assert blocks.take_copies() == [BlockCopy("onboard", 1, mine[0]), BlockCopy("onboard", 0, mine[1])]
    blocks.register(hashes(1, 2, 3, 4), mine, 0, 2)
    blocks.release(mine)
    assert blocks.allocate(2) is not None
    assert blocks.take_copies() == [], "the host has them still"
    assert (blocks.num_offloaded, blocks.num_onboarded) == (2, 2)


def test_the_host_gives_up_the_least_recently_used_but_not_what_is_on_its_way_back() -> None:
    blocks = BlockManager(2, WIDTH, num_host_blocks=1)
    fill(blocks, 1, 2)
    first = blocks.allocate(2)
    assert first is not None
    blocks.release(first)
    fill(blocks, 3, 4)
    fill(blocks, 5, 6)
    blocks.take_copies()
    table = blocks.allocate(2, blocks.match(hashes(1, 2, 9, 9), 4))
    assert table is not None
    copies = blocks.take_copies()
    assert [(copy.kind, copy.source) for copy in copies][:1] == [("onboard", 0)]
    assert [copy.kind for copy in copies[1:]] == ["offload"]
    assert blocks.host.find(hashes(1, 2).digest(0)) is None


def test_what_a_failed_copy_should_have_written_is_forgotten() -> None:
    blocks = BlockManager(1, WIDTH, num_host_blocks=2)
    fill(blocks, 1, 2)
    table = blocks.allocate(1)
    assert table is not None
    blocks.host.forget(copy.target for copy in blocks.take_copies())
    blocks.release(table)
    assert blocks.match(hashes(1, 2), 2) == Match()
    blocks.check([])


class Books(RuleBasedStateMachine):
    """Tables come, grow, are registered and go; contents are remembered by the test itself, on the host, too."""

    copy_on_partial_reuse = True

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(12, WIDE, copy_on_partial_reuse=self.copy_on_partial_reuse, num_host_blocks=5)
        self.tables: list[tuple[list[int], list[int], bool, int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.on_host: dict[int, tuple[int, ...]] = {}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), reserved=st.booleans())
    def allocate(self, tokens: list[int], reserved: bool) -> None:
        available = self.blocks.available
        match = self.blocks.match(BlockHashes(tokens, WIDE), len(tokens) - 1, only_whole_blocks=reserved)
        table = self.blocks.allocate(self.blocks.blocks_for(len(tokens)), match, reserved=reserved)
        if table is None:
            assert self.blocks.available == available
            return
        self._make_copies()
        if match.num_partial_tokens and not self.copy_on_partial_reuse:
            assert table[match.num_blocks] == match.partial
        present = match.num_blocks * WIDE + match.num_partial_tokens
        assert present < len(tokens)
        for index, block_id in enumerate(table):
            known = tuple(tokens[: min((index + 1) * WIDE, present)])
            if index * WIDE < present:
                assert self.content[block_id][: len(known)] == known, "a match of another prefix"
            if index >= len(match.shared):
                self.content[block_id] = known
        self.tables.append((tokens, table, reserved, present))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        tokens, table, _, _ = self.tables[index]
        self.blocks.commit(table)
        self.tables[index] = (tokens, table, False, len(tokens))
        for number, block_id in enumerate(table):
            self.content[block_id] = tuple(tokens[: (number + 1) * WIDE])
        self.blocks.register(BlockHashes(tokens, WIDE), table, 0, len(tokens) // WIDE)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        tokens, table, reserved, present = self.tables[index]
        available = self.blocks.available
        assert self.blocks.extend(table) == (available > 0)
        self._make_copies()
        if available:
            self.content.pop(table[-1], None)
            tokens += [0] * (len(table) * WIDE - WIDE + 1 - len(tokens))
            self.tables[index] = (tokens, table, reserved, min(present, len(tokens) // WIDE * WIDE))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        tokens, table, reserved, present = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        if not reserved and present == len(tokens):
            self.blocks.register_tail(BlockHashes(tokens, WIDE), table, present)
        self.blocks.release(table)

    def _make_copies(self) -> None:
        """As a device does: in order, before anything is written by the step."""
        for copy in self.blocks.take_copies():
            source = self.on_host if copy.kind == "onboard" else self.content
            target = self.on_host if copy.kind == "offload" else self.content
            target[copy.target] = source[copy.source]

    @invariant()
    def the_books_agree(self) -> None:
        self.blocks.check([table for _, table, _, _ in self.tables])
        counts = self.blocks.counts()
        assert counts.free + counts.cached + counts.used + counts.reserved == counts.total == 12

    def teardown(self) -> None:
        for _, table, _, _ in self.tables:
            self.blocks.release(table)
        self.blocks.check([])
        assert self.blocks.available == 12


class BooksWithoutCopies(Books):
    """The same, taking partial matches over."""

    copy_on_partial_reuse = False


TestBooks = Books.TestCase
TestBooksWithoutCopies = BooksWithoutCopies.TestCase
TestBooks.settings = TestBooksWithoutCopies.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, derandomize=True
)

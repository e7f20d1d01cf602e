"""Cache groups: all or nothing, windows that slide, matches over groups, keys beside tokens, forks, pending blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
import pytest

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.kv_cache import KvCache, Tables
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.prefix_cache import NO_BLOCK, BlockHashes, ExtraKey
from pdserve.errors import ConfigError
from pdserve.protocol import CacheGroupLimits
from tests.fakes.fake_runner import SMALL_LIMITS

WIDTH = SMALL_LIMITS.tokens_per_block
TOKENS = list(range(100, 140))


def make(*groups: tuple[int, int | None], num_host_blocks: int = 0, **options: bool) -> KvCache:
    """A cache of groups of (number of blocks, window)."""
    limits = tuple(CacheGroupLimits(*each) for each in groups)
    replaced = msgspec.structs.replace(SMALL_LIMITS, num_blocks=groups[0][0], cache_groups=limits)
    return KvCache(replaced, EngineOptions(**options), num_host_blocks)


def hashes(token_ids: Sequence[int], *keys: ExtraKey) -> BlockHashes:
    return BlockHashes(token_ids, WIDTH, keys)


def take(cache: KvCache, num_blocks: int) -> Tables:
    tables = cache.allocate(num_blocks, cache.nothing())
    assert tables is not None
    return tables


def fill(cache: KvCache, token_ids: Sequence[int]) -> Tables:
    """Compute `token_ids`, slide behind them, and end; returns the tables before that."""
    tables = take(cache, len(token_ids) // WIDTH)
    before = [list(table) for table in tables]
    cache.register(hashes(token_ids), tables, 0, len(tables[0]))
    cache.slide(tables, len(token_ids))
    cache.release(tables)
    return before


def check(cache: KvCache, *tables: Tables) -> None:
    deque(cache.checks(tables), 0)


def test_blocks_come_from_every_group_or_from_none() -> None:
    cache = make((8, None), (5, 8), (6, 4))
    before = cache.counts()
    assert cache.allocate(6, cache.nothing()) is None
    assert cache.allocate(5, cache.nothing(), headroom=1) is None
    assert cache.counts() == before
    tables = take(cache, 5)
    assert [len(table) for table in tables] == [5, 5, 5]
    assert not cache.extend(tables), "the second group has no more"
    assert [len(table) for table in tables] == [5, 5, 5]
    assert (cache.available, cache.counts().used, cache.counts().total) == (0, 15, 19)
    check(cache, tables)


def test_blocks_before_the_window_are_given_back_as_a_sequence_advances() -> None:
    cache = make((8, None), (8, 6))
    tables = take(cache, 4)
    full, windowed = [list(table) for table in tables]
    cache.slide(tables, 8)
    assert tables == [full, windowed], "the next token, at 8, looks back to 3"
    cache.slide(tables, 11)
    assert tables == [full, windowed], "and is computed again where others are, too, with the rest of its block"
    cache.slide(tables, 12)
    assert tables == [full, [NO_BLOCK, *windowed[1:]]]
    cache.slide(tables, 16)
    assert tables == [full, [NO_BLOCK, NO_BLOCK, *windowed[2:]]]
    assert cache.groups[1].counts().free == 6
    assert cache.extend(tables)
    assert [len(table) for table in tables] == [5, 5]
    check(cache, tables)
    cache.release(tables)
    check(cache)


def test_what_slid_out_of_a_window_stays_cached_and_goes_under_pressure() -> None:
    cache = make((16, None), (8, 6))
    tables = take(cache, 6)
    cache.register(hashes(TOKENS), tables, 0, 6)
    cache.slide(tables, 24)
    assert (cache.groups[1].counts().cached, cache.groups[1].counts().used) == (4, 2)
    assert cache.match(hashes(TOKENS), 8).num_blocks == 2
    taken = take(cache, 6)
    assert cache.groups[1].counts().cached == 0
    assert cache.groups[0].counts().cached == 0
    check(cache, tables, taken)


@pytest.mark.parametrize("lost", [None, 0, 3, 5, 9])
def test_a_match_needs_all_of_the_full_group_and_of_a_window_group_what_covers_its_window(lost: int | None) -> None:
    """Window 6 and blocks of 4: before token 4n the last two blocks are needed."""
    cache = make((16, None), (16, 6))
    _, windowed = fill(cache, TOKENS)
    if lost is not None:
        cache.groups[1]._cache.forget(windowed[lost])
        cache.groups[1]._free.append(windowed[lost])
    expected = 9 if lost == 9 else 10
    present = cache.match(hashes(TOKENS), 40)
    assert (present.num_blocks, present.num_proven_blocks) == (expected, expected)
    assert present.matches[1].num_absent == expected - 2
    assert len(present.matches[1].shared) == 2
    shorter = cache.match(hashes(TOKENS), 24).num_blocks
    assert shorter == {3: 6, 5: 5}.get(lost or 0, 6)
    tables = cache.allocate(10, present)
    assert tables is not None
    assert tables[1][: expected - 2] == [NO_BLOCK] * (expected - 2)
    check(cache, tables)


def test_a_hole_in_a_window_group_falls_back_to_the_longest_match_before_it() -> None:
    cache = make((16, None), (16, 6))
    _, windowed = fill(cache, TOKENS)
    for lost in (3, 5, 7, 8, 9):
        cache.groups[1]._cache.forget(windowed[lost])
        cache.groups[1]._free.append(windowed[lost])
    assert cache.match(hashes(TOKENS), 40).num_blocks == 3, "blocks 5 and 6 would do for 7, but 5 is lost; so on to 3"
    check(cache)


def test_an_import_takes_of_a_window_group_only_the_window_before_its_end() -> None:
    cache = make((16, None), (16, 6))
    fill(cache, TOKENS[:20])
    present = cache.match(hashes(TOKENS), 38, num_imported_tokens=39)
    assert (present.num_blocks, present.num_shared_blocks) == (5, 5)
    assert [match.num_absent for match in present.matches] == [0, 8]
    tables = cache.allocate(10, present, reserved=True)
    assert tables is not None
    assert tables[1][:8] == [NO_BLOCK] * 8
    assert cache.counts().reserved == 5 + 2
    cache.commit(tables)
    check(cache, tables)
    assert cache.moved(tables, 39) == tables


def test_a_handoff_moves_only_the_last_window() -> None:
    cache = make((16, None), (16, 6))
    tables = take(cache, 5)
    moved = cache.moved(tables, 20)
    assert moved == [tables[0], [NO_BLOCK] * 3 + tables[1][3:]]
    cache.slide(tables, 20)
    assert moved == tables, "and keeps it until the sequence is released"


def test_host_blocks_need_one_group_without_a_window() -> None:
    for groups in ([(8, None), (8, 6)], [(8, 6)]):
        with pytest.raises(ConfigError, match="host_cache_size"):
            make(*groups, num_host_blocks=1)
    assert make((8, 1000), num_host_blocks=1).has_windows is False, "a window that no sequence fills is none"


def test_keys_beside_the_tokens_share_nothing_with_others() -> None:
    named = {
        keys: hashes(TOKENS, *keys).digest(0)
        for keys in [(), ("",), ("a",), (b"a",), ("a", "b"), ("ab",), ("", "a"), ("b", "a")]
    }
    assert len(set(named.values())) == len(named)


def test_a_picture_is_told_from_the_block_on_in_which_it_begins() -> None:
    def digests(*keys_at: tuple[int, ExtraKey]) -> list[bytes]:
        named = BlockHashes(TOKENS, WIDTH, ("salt",), keys_at=keys_at)
        return [named.digest(index) for index in range(5)]

    plain, cat, dog, later = digests(), digests((9, b"cat")), digests((9, b"dog")), digests((10, b"cat"))
    assert plain[:2] == cat[:2] == dog[:2] == later[:2]
    assert len({each[index] for each in (plain, cat, dog, later) for index in (2, 3, 4)}) == 12
    both = digests((9, b"cat"), (17, b"dog"))
    assert both[:4] == cat[:4]
    assert both[4] != cat[4]


def test_part_of_a_block_with_another_picture_is_not_reused() -> None:
    cache = make((8, None))
    for picture in (b"cat", b"dog"):
        named = BlockHashes(TOKENS[:8], WIDTH, keys_at=[(5, picture)])
        present = cache.match(named, 7)
        assert (present.num_blocks, present.num_partial_tokens) == ((0, 0) if picture == b"cat" else (1, 0))
        tables = take(cache, 2)
        cache.register(named, tables, 0, 2)
        cache.release(tables)


def test_who_writes_to_a_forked_block_gets_a_copy_and_the_last_holder_keeps_it() -> None:
    cache = make((8, None), (8, 6))
    parent = take(cache, 3)
    cache.slide(parent, 10)
    children = [cache.fork(parent, 10) for _ in range(2)]
    check(cache, parent, *children)
    assert cache.groups[0].counts().used == 3
    before = children[0][0]
    assert cache.own(children[0], 2)
    assert children[0][0] is not before, "a table that changed is another list"
    assert cache.own(children[1], 2)
    assert cache.own(parent, 2)
    copies = cache.take_copies()
    assert copies == [
        *(BlockCopy("duplicate", parent[0][2], child[0][2]) for child in children),
        *(BlockCopy("duplicate", parent[1][2], child[1][2], group=1) for child in children),
    ]
    assert parent[0][:2] == children[0][0][:2] == children[1][0][:2]
    check(cache, parent, *children)
    cache.release(parent)
    check(cache, *children)


def test_without_a_block_for_the_copy_nobody_writes_to_a_shared_one() -> None:
    cache = make((3, None), (4, 6))
    parent = take(cache, 3)
    child = cache.fork(parent, 10)
    assert len(cache.fork(parent, 8)[0]) == 2
    cache.release([table[:2] for table in parent])
    assert not cache.own(child, 2)
    check(cache, parent, child)
    cache.release(parent)
    assert cache.own(child, 2)
    assert cache.take_copies() == []


def test_pending_blocks_can_be_read_by_later_steps_but_not_by_an_import() -> None:
    cache = make((8, None))
    tables = take(cache, 5)
    cache.register(hashes(TOKENS), tables, 0, 2)
    cache.register(hashes(TOKENS), tables, 2, 4, pending=True)
    present = cache.match(hashes(TOKENS), 19)
    assert (present.num_blocks, present.num_shared_blocks, present.num_proven_blocks) == (4, 4, 2)
    assert cache.match(hashes(TOKENS), 19, num_imported_tokens=20).num_blocks == 2
    cache.settle(tables, 16)
    assert cache.match(hashes(TOKENS), 19).num_proven_blocks == 4
    check(cache, tables)


def test_pending_blocks_of_a_failed_step_are_not_offered_any_more_also_if_others_hold_them() -> None:
    cache = make((8, None), (8, 6))
    tables = take(cache, 4)
    cache.register(hashes(TOKENS), tables, 0, 4, pending=True)
    present = cache.match(hashes(TOKENS), 17)
    assert (present.num_blocks, present.num_proven_blocks) == (4, 0)
    assert present.matches[1].num_absent == 0, "what may be computed again needs its window"
    other = cache.allocate(5, present)
    assert other is not None
    assert cache.num_present(other, 0, 5) == 4
    cache.void(tables, 16)
    assert cache.num_present(other, 0, 5) == 0
    assert cache.match(hashes(TOKENS), 17).num_blocks == 0
    check(cache, tables, other)
    cache.release(tables)
    cache.release(other)
    assert cache.counts().free == 16
    check(cache)


def test_blocks_that_one_step_computes_in_one_group_only_are_not_taken() -> None:
    """Were they computed again after a failure, a block that others read would be written to."""
    cache = make((16, None), (16, 6))
    fill(cache, TOKENS[:16])
    again = take(cache, 6)
    first = cache.groups[0].find(hashes(TOKENS).digest(3))
    cache.groups[0]._cache.forget(first)
    cache.groups[0]._free.append(first)
    cache.register(hashes(TOKENS), again, 0, 6, pending=True)
    present = cache.match(hashes(TOKENS), 24)
    assert (present.num_blocks, present.num_proven_blocks) == (3, 3)
    check(cache, again)

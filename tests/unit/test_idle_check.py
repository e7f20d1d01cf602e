"""An engine's books are audited while it is idle, and nobody waits for more than a slice of that."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import pytest

from pdserve.engine.hosts.idle_check import QUIET_S, IdleCheck
from pdserve.engine.schedule import block_manager
from pdserve.engine.schedule.block_manager import BlockManager, BrokenInvariant
from pdserve.engine.schedule.prefix_cache import BlockHashes


class Books:
    """Stands for an engine whose check takes `num_slices`."""

    def __init__(self, num_slices: int) -> None:
        self.is_idle = True
        self.num_slices = num_slices
        self.begun = self.checked = 0

    def checks(self) -> Iterator[None]:
        self.begun += 1
        for _ in range(self.num_slices):
            self.checked += 1
            yield


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_check_begins_after_a_quiet_while_and_yields_between_slices() -> None:
    books, clock = Books(3), Clock()
    check = IdleCheck(books, clock)  # type: ignore[arg-type]
    assert check.run_slice() is None, "nothing has happened yet"
    check.note_work()
    assert check.run_slice() == QUIET_S
    clock.now_s += QUIET_S / 4
    assert check.run_slice() == pytest.approx(0.75 * QUIET_S)
    clock.now_s += QUIET_S
    assert [check.run_slice() for _ in range(5)] == [0.0, 0.0, 0.0, None, None]
    assert (books.begun, books.checked) == (1, 3)


def test_work_ends_a_check_and_makes_another_due() -> None:
    books, clock = Books(3), Clock()
    check = IdleCheck(books, clock)  # type: ignore[arg-type]
    check.note_work()
    check.run_slice()
    clock.now_s += QUIET_S
    assert check.run_slice() == 0.0
    check.note_work()
    books.is_idle = False
    assert check.run_slice() is None
    books.is_idle = True
    assert check.run_slice() == QUIET_S
    clock.now_s += QUIET_S
    while check.run_slice() == 0.0:
        pass
    assert (books.begun, books.checked) == (2, 4)


def test_a_slice_looks_at_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_manager, "_CHECKED_AT_ONCE", 10)
    blocks = BlockManager(100, 2, num_host_blocks=30)
    table = blocks.allocate(40)
    assert table is not None
    blocks.register(BlockHashes(range(80), 2), table, 0, 40)
    blocks.release(table)
    assert sum(1 for _ in blocks.checks([])) == 10 + (1 + 4 + 1) + (1 + 3)


@pytest.mark.parametrize("harm", ["_by_first_token", "_block_by_digest"])
def test_maps_that_differ_are_found(harm: str) -> None:
    blocks = BlockManager(8, 2)
    table = blocks.allocate(4)
    assert table is not None
    blocks.register(BlockHashes(range(8), 2), table, 0, 4)
    blocks.release(table)
    blocks.check([])
    entries = getattr(blocks._cache, harm)
    first, second, *_ = entries
    entries[first], entries[second] = entries[second], entries[first]
    with pytest.raises(BrokenInvariant, match="the prefix cache's maps differ"):
        blocks.check([])


def test_a_check_that_fails_is_raised_to_the_host() -> None:
    blocks = BlockManager(8, 2)
    blocks.allocate(1)

    class Lost(Books):
        def checks(self) -> Iterator[None]:
            return blocks.checks([])

    clock = Clock()
    check = IdleCheck(Lost(0), clock)  # type: ignore[arg-type]
    check.note_work()
    check.run_slice()
    clock.now_s += QUIET_S
    with pytest.raises(BrokenInvariant, match="users are not the tables"):
        deque(iter(check.run_slice, None), 0)

"""The scheduler alone: who gets which share of a step, who waits, who is set back."""

from __future__ import annotations

from collections import deque

import pytest

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.prompts import equal_shares, shares_in_order
from pdserve.engine.schedule.sequence import SequenceState
from tests.unit.scheduler_bench import Bench, finish


def test_decodes_come_first_and_prompts_share_what_is_left_in_order() -> None:
    bench = Bench()
    a = bench.add(6)
    assert bench.run()[1] == [(a, 0, 6)]
    b, c = bench.add(20), bench.add(5)
    assert bench.run()[1] == [(a, 6, 1), (b, 0, 15)]
    assert bench.run()[1] == [(a, 7, 1), (b, 15, 5), (c, 0, 5)]
    assert bench.run()[1] == [(a, 8, 1), (b, 20, 1), (c, 5, 1)]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_with_room_for_all_of_it() -> None:
    bench = Bench(chunked=False)
    a, b = bench.add(10), bench.add(10)
    assert bench.run()[1] == [(a, 0, 10)]
    assert bench.run()[1] == [(a, 10, 1), (b, 0, 10)]


def test_max_batch_size_bounds_running_and_receiving_together() -> None:
    bench = Bench(max_batch_size=2)
    a, g, b = bench.add(3), bench.add(3, "generation"), bench.add(3)
    plan, shares = bench.run()
    assert shares == [(a, 0, 3)]
    assert plan.accepted == [g]
    assert list(bench.scheduler.waiting) == [b]


def test_a_prompt_is_admitted_only_with_blocks_for_all_of_it() -> None:
    bench = Bench(num_blocks=8)
    a, b = bench.add(20, "context"), bench.add(16, "context")
    plan, _ = bench.run()
    assert plan.admitted == [a]
    bench.run()
    assert list(bench.scheduler.waiting) == [b]
    bench.scheduler.remove(a)
    bench.scheduler.release(a)
    assert bench.run()[0].admitted == [b]
    assert len(b.tables[0]) == 4


def test_a_watermark_is_kept_for_running_decodes_but_never_stops_the_only_sequence() -> None:
    bench = Bench(num_blocks=8)
    a = bench.add(28)
    assert bench.run()[0].admitted == [a]
    assert bench.add(3) in bench.scheduler.waiting
    bench.run()
    assert len(bench.scheduler.waiting) == 1
    alone = Bench(num_blocks=8)
    whole = alone.add(32)
    assert alone.run()[0].admitted == [whole]


def test_the_latest_arrival_is_preempted_keeps_its_tokens_and_waits_at_the_head() -> None:
    bench = Bench(num_blocks=5)
    a, b = bench.add(8), bench.add(7)
    bench.run()
    late = bench.add(3)
    for _ in range(10):
        if bench.scheduler.num_preemptions:
            break
        bench.run()
    assert bench.scheduler.num_preemptions == 1
    assert a.state is SequenceState.RUNNING
    assert b.state is SequenceState.WAITING
    assert (b.num_computed, b.tables[0]) == (0, [])
    assert b.token_ids[7:] == b.output_ids == [7] * len(b.output_ids) != []
    assert list(bench.scheduler.waiting) == [b, late]
    bench.scheduler.remove(a)
    bench.scheduler.release(a)
    plan, _ = bench.run()
    assert plan.sequences[0] is b
    assert (plan.items[0].start, plan.items[0].num_sampled) == (8, 1)


def test_a_recomputed_sequence_may_be_cut_even_without_chunked_prefill() -> None:
    bench = Bench(chunked=False)
    a = bench.add(14)
    bench.run()
    a.token_ids += [7] * 6
    bench.scheduler._preempt(a)
    bench.blocks.enable_block_reuse = False
    assert bench.run()[1] == [(a, 0, 16)]
    assert bench.run()[1] == [(a, 16, 5)]


def test_a_shared_prefix_is_reused_and_the_last_token_always_computed() -> None:
    bench = Bench()
    bench.add(12, first=500)
    bench.run()
    again = bench.add(12, first=500)
    assert bench.run()[1][1:] == [(again, 8, 4)]


def test_blocks_are_reusable_only_once_they_are_computed() -> None:
    bench = Bench(max_num_tokens=28)
    for _ in range(2):
        bench.add(12, first=500)
    assert [(start, length) for _, start, length in bench.run()[1]] == [(0, 12), (0, 12)]


def test_an_import_skips_the_prefix_that_is_present_and_registers_the_rest() -> None:
    bench = Bench()
    bench.add(9, first=500)
    bench.run()
    g = bench.add(13, "generation", first=500)
    assert bench.run()[0].accepted == [g]
    assert g.num_computed == 8
    assert bench.blocks.counts().reserved == 2
    g.move_to(SequenceState.RECEIVING)
    bench.scheduler.received(g, 9)
    assert bench.blocks.counts().reserved == 0
    assert (g.num_computed, g.token_ids[-1]) == (13, 9)
    after = bench.add(13, first=500)
    assert (after, 12, 1) in bench.run()[1]


def test_nobody_overtakes_an_older_sequence_that_lacks_blocks() -> None:
    bench = Bench(num_blocks=8)
    a, big, small = bench.add(20), bench.add(16, "generation"), bench.add(3)
    plan, shares = bench.run()
    assert (plan.accepted, [share[0] for share in shares]) == ([], [a])
    bench = Bench(num_blocks=8)
    a, big, small = bench.add(20), bench.add(16), bench.add(3, "generation")
    bench.run()
    plan, _ = bench.run()
    assert list(bench.scheduler.waiting) == [big]
    assert (plan.accepted, list(bench.scheduler.offered)) == ([], [small])


def test_a_sequence_whose_blocks_are_named_to_a_peer_is_never_preempted() -> None:
    bench = Bench(num_blocks=8, max_num_tokens=8)
    a = bench.add(4)
    bench.run()
    c = bench.add(20, "context")
    bench.run()
    taken = bench.blocks.groups[0].allocate(bench.blocks.available)
    assert taken is not None
    a.token_ids += [7] * (len(a.tables[0]) * 4 + 1 - len(a.token_ids))
    a.num_computed = a.num_planned = len(a.token_ids) - 1
    bench.run()
    assert (a.state, c.state) == (SequenceState.WAITING, SequenceState.RUNNING)


def test_no_evict_admits_only_with_blocks_for_all_that_may_come() -> None:
    bench = Bench(num_blocks=8, capacity="GUARANTEED_NO_EVICT")
    a = bench.add(4, max_tokens=17)
    b = bench.add(4, max_tokens=17)
    assert bench.run()[0].admitted == [a], "five blocks each, and eight there are"
    for _ in range(15):
        plan, _ = bench.run()
        assert plan.admitted == []
    assert (len(a.tables[0]), bench.scheduler.num_preemptions) == (5, 0)
    finish(bench, a)
    assert bench.run()[0].admitted == [b]


def test_no_evict_counts_what_those_who_run_may_still_ask_for() -> None:
    bench = Bench(num_blocks=8, capacity="GUARANTEED_NO_EVICT")
    a, b = bench.add(4, max_tokens=13), bench.add(4, max_tokens=13)
    assert bench.run()[0].admitted == [a, b]
    assert bench.blocks.available == 6
    c = bench.add(1, max_tokens=1)
    assert bench.run()[0].admitted == [], "four blocks are free, and all of them promised"
    finish(bench, a)
    assert bench.run()[0].admitted == [c]
    deque(bench.scheduler.checks([b, c]), 0)


def test_no_evict_counts_a_shared_prefix_once() -> None:
    bench = Bench(num_blocks=8, capacity="GUARANTEED_NO_EVICT")
    a = bench.add(13, first=500, max_tokens=8)
    bench.run()
    b = bench.add(13, first=500, max_tokens=8)
    other = bench.add(13, max_tokens=8)
    assert bench.run()[0].admitted == [b], "five blocks, of which three are shared"
    assert len(set(a.tables[0]) & set(b.tables[0])) == 3
    assert list(bench.scheduler.waiting) == [other]


def test_no_evict_promises_imports_their_output_and_exports_nothing_beyond_their_prompt() -> None:
    bench = Bench(num_blocks=8, capacity="GUARANTEED_NO_EVICT")
    exports = [bench.add(8, "context") for _ in range(4)]
    admitted = [bench.run()[0].admitted for _ in range(3)]
    assert admitted == [exports[:2], exports[2:3], exports[3:]], "two blocks each"
    bench = Bench(num_blocks=8, capacity="GUARANTEED_NO_EVICT")
    imports = [bench.add(8, "generation", max_tokens=9) for _ in range(3)]
    assert bench.run()[0].accepted == imports[:2], "four blocks each"


def test_a_static_batch_starts_when_the_one_before_it_is_over() -> None:
    bench = Bench(capacity="STATIC_BATCH", max_num_tokens=8)
    a, b = bench.add(6, max_tokens=3), bench.add(6, max_tokens=3)
    plan, shares = bench.run()
    assert plan.admitted == [a, b], "the batch is not bounded by one step's tokens"
    assert shares == [(a, 0, 6)]
    c = bench.add(3)
    assert bench.run()[1] == [(a, 6, 1), (b, 0, 6)]
    finish(bench, a)
    assert bench.run()[0].admitted == []
    finish(bench, b)
    assert bench.run()[0].admitted == [c]


def test_equal_progress_shares_a_step_in_whole_blocks() -> None:
    bench = Bench(chunking="EQUAL_PROGRESS")
    a, b, c = bench.add(30), bench.add(20), bench.add(3)
    assert bench.run()[1] == [(a, 0, 8), (b, 0, 5), (c, 0, 3)], "what c leaves and is less than a block goes to b"
    assert bench.run()[1] == [(c, 3, 1), (a, 8, 8), (b, 5, 7)]
    in_order = Bench()
    a, b, c = in_order.add(30), in_order.add(20), in_order.add(3)
    assert in_order.run()[1] == [(a, 0, 16)]


@pytest.mark.parametrize(
    ("wanted", "budget", "expected"),
    [
        ([100, 100], 64, [32, 32]),
        ([100, 8, 100], 64, [28, 8, 28]),
        ([100, 100, 100], 8, [4, 4, 0]),
        ([100, 100], 3, [3, 0]),
        ([5, 0, 7], 64, [5, 0, 7]),
        ([], 64, []),
    ],
)
def test_equal_shares(wanted: list[int], budget: int, expected: list[int]) -> None:
    assert equal_shares(wanted, budget, 4) == expected


def test_shares_in_order_leave_out_who_may_not_be_cut() -> None:
    assert shares_in_order([10, 10, 4], 16, [True, False, True], 11) == [10, 0, 4]
    assert shares_in_order([10, 10], 16, [True, True], 11) == [10, 6]


def test_shares_in_order_give_a_large_prompt_a_step_without_those_before_it() -> None:
    any_cut = [True] * 4
    assert shares_in_order([8, 4, 2, 9], 16, any_cut, 8) == [8, 4, 2, 0]
    assert shares_in_order([4, 8, 2, 2], 16, any_cut, 8) == [4, 0, 0, 0], "nobody overtakes it"
    assert shares_in_order([40, 8, 2, 2], 16, any_cut, 8) == [16, 0, 0, 0]
    assert shares_in_order([0, 8, 2, 2], 16, any_cut, 8) == [0, 8, 2, 2], "the first wants nothing"


def test_part_of_a_block_is_reused_and_the_rest_of_the_prompt_computed() -> None:
    bench = Bench(partial=True)
    a = bench.add(12, first=500)
    bench.run()
    b = bench.add(10, first=500)
    plan, shares = bench.run()
    assert shares[1:] == [(b, 9, 1)]
    assert plan.copies == [BlockCopy("duplicate", a.tables[0][2], b.tables[0][2])]
    assert b.num_computed == 10
    assert b.num_registered_blocks == 2

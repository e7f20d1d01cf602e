"""Steps in which some decode and others' prompts are computed: who may take how much of them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.config.llm_args import CapacitySchedulerPolicy, ContextChunkingPolicy
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from tests.unit.scheduler_bench import Bench, finish


def test_a_step_in_which_somebody_decodes_computes_few_tokens_of_prompts() -> None:
    bench = Bench(mixed=5)
    a = bench.add(20)
    assert bench.run()[1] == [(a, 0, 16)], "nobody decodes"
    bench.run()
    b, c = bench.add(7), bench.add(4)
    assert bench.run()[1] == [(a, 20, 1), (b, 0, 5)]
    assert bench.run()[1] == [(a, 21, 1), (b, 5, 2), (c, 0, 3)]
    finish(bench, a)
    finish(bench, b)
    d = bench.add(16)
    assert bench.run()[1] == [(c, 3, 1), (d, 0, 5)], "the last token of a prompt is computed as a decode is"
    finish(bench, c)
    assert bench.run()[1] == [(d, 5, 11)]


def test_imports_are_accepted_while_a_prompt_waits_for_its_share() -> None:
    bench = Bench(mixed=2)
    bench.add(4)
    bench.run()
    prompt, late, imported = bench.add(20), bench.add(8), bench.add(6, "generation")
    plan, shares = bench.run()
    assert shares[1:] == [(prompt, 0, 2)]
    assert (plan.accepted, list(bench.scheduler.waiting)) == ([imported], [late])


def test_kv_under_way_is_not_kept_waiting_by_a_long_step() -> None:
    bench = Bench(mixed=5)
    imported, prompt = bench.add(6, "generation"), bench.add(20)
    plan, shares = bench.run()
    assert (plan.accepted, shares) == ([imported], [(prompt, 0, 5)])
    assert bench.run()[1] == [(prompt, 5, 5)]
    imported.move_to(SequenceState.RECEIVING)
    bench.scheduler.received(imported, 7)
    assert bench.run()[1] == [(imported, 6, 1), (prompt, 10, 5)]
    finish(bench, imported)
    assert bench.run()[1] == [(prompt, 15, 5)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    mixed=st.integers(1, 20),
    chunking=st.sampled_from(["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"]),
    capacity=st.sampled_from(["MAX_UTILIZATION", "GUARANTEED_NO_EVICT", "STATIC_BATCH"]),
    arrivals=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12),
)
def test_however_few_tokens_of_prompts_a_mixed_step_computes_everybody_finishes(
    mixed: int,
    chunking: ContextChunkingPolicy,
    capacity: CapacitySchedulerPolicy,
    arrivals: list[tuple[int, int, int]],
) -> None:
    bench = Bench(mixed=mixed, chunking=chunking, capacity=capacity)
    live: list[Sequence] = []
    arrivals = sorted(arrivals)
    for step in range(2000):
        while arrivals and arrivals[0][0] <= step:
            _, num_tokens, max_tokens = arrivals.pop(0)
            live.append(bench.add(num_tokens, max_tokens=max_tokens))
        plan, _ = bench.run()
        room = min(mixed, 16 - plan.num_decode_tokens) if plan.num_decode_tokens else 16
        hungry = [each for each in bench.scheduler.running if len(each.token_ids) - each.num_planned > 1]
        assert plan.num_prefill_tokens <= room
        large = chunking == "FIRST_COME_FIRST_SERVED" and room > 8
        kept_out = large and any(len(each.token_ids) - each.num_planned >= 8 for each in hungry)
        assert plan.num_prefill_tokens == room or not hungry or (kept_out and plan.num_prefill_tokens)
        for sequence in [each for each in live if each.end_reason()]:
            finish(bench, sequence)
            live.remove(sequence)
        if not live and not arrivals:
            return
    pytest.fail(f"still there: {live}")

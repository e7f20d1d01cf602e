"""The scheduler alone: who gets which share of a step, who waits, who is set back."""

from __future__ import annotations

import msgspec

from pdserve.engine.block_manager import BlockManager
from pdserve.engine.scheduler import Plan, Scheduler
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.protocol import EngineLimits, GenerateRequest, Key, Phase, Sampling
from tests.fakes.fake_link import PEER

LIMITS = EngineLimits(
    max_seq_len=64, max_batch_size=4, max_num_tokens=16, vocab_size=1000, num_blocks=16, tokens_per_block=4
)


class Bench:
    """A scheduler with nothing around it; `run` pretends that the model computed the plan."""

    def __init__(self, *, chunked: bool = True, **limits: int) -> None:
        self.limits = msgspec.structs.replace(LIMITS, **limits)
        self.blocks = BlockManager(self.limits.num_blocks, self.limits.tokens_per_block)
        self.scheduler = Scheduler(self.blocks, self.limits, chunked)
        self.arrivals = 0

    def add(self, num_tokens: int, phase: Phase = "both", first: int = 0) -> Sequence:
        """A sequence with tokens of its own, or with those of another that has the same `first`."""
        self.arrivals += 1
        first = first or 100 * self.arrivals
        request = GenerateRequest(
            key=Key(f"r{self.arrivals}", 0),
            token_ids=list(range(first, first + num_tokens)),
            num_prompt_tokens=num_tokens,
            sampling=Sampling(seed=0, max_tokens=100),
            timeout_s=60,
            phase=phase,
            peer=PEER if phase == "context" else None,
        )
        sequence = Sequence(request, self.limits, self.arrivals, 0.0)
        (self.scheduler.offered if phase == "generation" else self.scheduler.waiting)[sequence] = None
        return sequence

    def run(self) -> tuple[Plan, list[tuple[Sequence, int, int]]]:
        plan = self.scheduler.plan()
        assert plan is not None
        shares = [(s, item.start, len(item.token_ids)) for s, item in zip(plan.sequences, plan.items, strict=True)]
        self.scheduler.launched(plan)
        for sequence, item in zip(plan.sequences, plan.items, strict=True):
            self.scheduler.collected(sequence, item)
            self.scheduler.advance(sequence, len(item.token_ids))
            if item.sample:
                sequence.append(7)
        return plan, shares


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
    assert len(b.block_ids) == 4


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
    assert (b.num_computed, b.block_ids) == (0, [])
    assert b.token_ids[7:] == b.output_ids == [7] * len(b.output_ids) != []
    assert list(bench.scheduler.waiting) == [b, late]
    bench.scheduler.remove(a)
    bench.scheduler.release(a)
    plan, _ = bench.run()
    assert plan.sequences[0] is b
    assert (plan.items[0].start, plan.items[0].sample) == (8, True)


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
    bench = Bench()
    for _ in range(2):
        bench.add(12, first=500)
    assert [(start, length) for _, start, length in bench.run()[1]] == [(0, 12), (0, 4)]


def test_an_import_skips_the_prefix_that_is_present_and_registers_the_rest() -> None:
    bench = Bench()
    bench.add(9, first=500)
    bench.run()
    g = bench.add(13, "generation", first=500)
    assert bench.run()[0].accepted == [g]
    assert g.num_computed == 8
    assert bench.blocks.counts().reserved == 2
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
    taken = bench.blocks.allocate(bench.blocks.available)
    assert taken is not None
    a.token_ids += [7] * (len(a.block_ids) * 4 + 1 - len(a.token_ids))
    a.num_computed = a.num_planned = len(a.token_ids) - 1
    bench.run()
    assert (a.state, c.state) == (SequenceState.WAITING, SequenceState.RUNNING)

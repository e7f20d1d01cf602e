"""Steps in flight: what waits for the copies of blocks before them, and what fails with them."""

from __future__ import annotations

from collections.abc import Sequence as List

import msgspec
import pytest

from pdserve.engine.schedule.admission import RequestTable
from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.handoffs import Handoffs
from pdserve.engine.schedule.kv_cache import KvCache
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.engine.schedule.step_pipeline import StepPipeline
from pdserve.protocol import Key
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner
from tests.unit.engine_bench import request
from tests.unit.test_engine_handoff import Pair, make_request


class Importer:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.accepted: list[Key] = []
        self.aborted: list[Key] = []

    def accept(self, key: Key, tables: List[List[int]], num_cached_tokens: int) -> None:
        self.accepted.append(key)

    def abort(self, key: Key) -> None:
        self.aborted.append(key)


class Bench:
    """A pipeline that is given plans by hand."""

    def __init__(self) -> None:
        self.runner, self.importer = FakeRunner(num_host_blocks=4), Importer()
        limits, options = msgspec.structs.replace(SMALL_LIMITS, num_blocks=8, cache_groups=()), EngineOptions()
        self.scheduler = Scheduler(KvCache(limits, options, num_host_blocks=4), limits, options)
        self.handoffs = Handoffs(self.scheduler, RequestTable(), SMALL_LIMITS.vocab_size, None, self.importer)
        self.pipeline = StepPipeline(self.runner, self.scheduler, self.handoffs)

    def launch(self, *copies: BlockCopy, accepted: List[Sequence] = ()) -> None:
        plan = PlannedStep(SMALL_LIMITS.max_num_tokens)
        plan.copies, plan.accepted = list(copies), list(accepted)
        self.pipeline.launch(plan)

    def offered(self) -> Sequence:
        """An import that the scheduler has given blocks."""
        sequence = Sequence(request(phase="generation"), SMALL_LIMITS, 0, 0.0)
        self.scheduler.offered[sequence] = None
        plan = self.scheduler.plan()
        assert plan is not None
        assert plan.accepted == [sequence]
        return sequence


OFFLOAD, ONBOARD = BlockCopy("offload", 0, 2), BlockCopy("onboard", 2, 1)


def test_without_copies_the_mover_hears_of_an_import_at_once() -> None:
    bench = Bench()
    sequence = bench.offered()
    bench.launch(accepted=[sequence])
    assert bench.importer.accepted == [sequence.key]
    assert sequence.state is SequenceState.RECEIVING
    assert len(bench.pipeline) == 0


@pytest.mark.parametrize("copies_in", ["its own step", "the step before"])
def test_the_mover_hears_of_an_import_when_no_copy_is_under_way(copies_in: str) -> None:
    bench = Bench()
    sequence = bench.offered()
    if copies_in == "the step before":
        bench.launch(OFFLOAD)
    bench.launch(*([OFFLOAD] if copies_in == "its own step" else []), accepted=[sequence])
    assert bench.importer.accepted == []
    bench.pipeline.collect()
    assert bench.importer.accepted == [sequence.key]
    assert (sequence.state, sequence.num_in_flight) == (SequenceState.RECEIVING, 0)


def test_an_import_that_ends_before_the_mover_hears_of_it_frees_its_blocks_after_the_copies() -> None:
    bench = Bench()
    sequence = bench.offered()
    bench.launch(OFFLOAD, accepted=[sequence])
    bench.handoffs.close(sequence)
    assert sequence.state is SequenceState.ABORTING
    assert bench.scheduler.blocks.counts().reserved == 2
    bench.pipeline.collect()
    assert sequence.state is SequenceState.FINISHED
    assert bench.scheduler.blocks.counts().free == 8
    assert (bench.importer.accepted, bench.importer.aborted) == ([], [sequence.key])


def test_a_step_that_may_have_read_what_a_failed_one_should_have_written_fails_too() -> None:
    bench = Bench()
    bench.runner.late_failures = [RuntimeError("boom")]
    for copy in (OFFLOAD, ONBOARD):
        bench.launch(copy)
    assert [isinstance(bench.pipeline.collect()[1], Exception) for _ in range(2)] == [True, True]
    bench.launch(ONBOARD)
    assert bench.pipeline.collect()[1] == []


@pytest.mark.parametrize("late", [False, True])
def test_an_import_whose_prefix_could_not_be_brought_back_fails_and_leaves_nothing(late: bool) -> None:
    pair = Pair(generation_blocks=5, host_blocks=8)
    for name, first in (("a", 2), ("b", 30)):
        pair.submit(make_request(name, list(range(first, first + 13)), max_tokens=4))
        pair.settle()
    again = make_request("again", list(range(2, 15)), max_tokens=4)
    pair.submit(again)
    pair.step()
    pair.link.advance(again.key)
    runner = pair.link.target
    (runner.late_failures if late else runner.failures).append(RuntimeError("boom"))
    pair.step()
    error = pair.generation_client.end("again").error
    assert error is not None
    assert error.code == "engine_error"
    assert pair.generation.stats().onboarded_blocks > 0
    pair.settle()
    pair.check_at_rest()
    pair.submit(make_request("later", list(range(2, 15)), max_tokens=4))
    pair.settle()
    assert len(pair.tokens(Key("later", 0))) == 4
    pair.check_at_rest()

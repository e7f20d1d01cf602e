"""A scheduler with nothing around it."""

from __future__ import annotations

from typing import Any

import msgspec

from pdserve.config.llm_args import CapacitySchedulerPolicy, ContextChunkingPolicy
from pdserve.engine.schedule.kv_cache import KvCache
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence
from pdserve.protocol import EngineLimits, GenerateRequest, Key, Phase, Sampling
from tests.fakes.fake_link import PEER

LIMITS = EngineLimits(
    max_seq_len=64, max_batch_size=4, max_num_tokens=16, vocab_size=1000, num_blocks=16, tokens_per_block=4
)


class Bench:
    """A scheduler with nothing around it; `run` pretends that the model computed the plan."""

    def __init__(
        self,
        *,
        chunked: bool = True,
        capacity: CapacitySchedulerPolicy = "MAX_UTILIZATION",
        chunking: ContextChunkingPolicy = "FIRST_COME_FIRST_SERVED",
        partial: bool = False,
        mixed: int | None = None,
        **limits: Any,
    ) -> None:
        self.limits = msgspec.structs.replace(LIMITS, **limits)
        options = EngineOptions(
            enable_partial_reuse=partial,
            enable_chunked_prefill=chunked,
            capacity_policy=capacity,
            chunking_policy=chunking,
            max_mixed_prefill_tokens=mixed,
        )
        self.blocks = KvCache(self.limits, options)
        self.scheduler = Scheduler(self.blocks, self.limits, options)
        self.arrivals = 0

    def add(self, num_tokens: int, phase: Phase = "both", first: int = 0, max_tokens: int = 100) -> Sequence:
        """A sequence with tokens of its own, or with those of another that has the same `first`."""
        self.arrivals += 1
        first = first or 100 * self.arrivals
        request = GenerateRequest(
            key=Key(f"r{self.arrivals}", 0),
            token_ids=list(range(first, first + num_tokens)),
            num_prompt_tokens=num_tokens,
            sampling=Sampling(seed=0, max_tokens=max_tokens),
            timeout_s=60,
            phase=phase,
            peer=PEER if phase == "context" else None,
        )
        sequence = Sequence(request, self.limits, self.arrivals, 0.0)
        (self.scheduler.offered if phase == "generation" else self.scheduler.waiting)[sequence] = None
        return sequence

    def run(self) -> tuple[PlannedStep, list[tuple[Sequence, int, int]]]:
        plan = self.scheduler.plan()
        assert plan is not None
        shares = [(s, item.start, len(item.token_ids)) for s, item in zip(plan.sequences, plan.items, strict=True)]
        self.scheduler.launched(plan)
        self.scheduler.sharing.succeeded(plan)
        for sequence, item in zip(plan.sequences, plan.items, strict=True):
            self.scheduler.collected(sequence, item)
            self.scheduler.advance(sequence, len(item.token_ids), len(item.token_ids))
            if item.num_sampled:
                sequence.append(7)
        return plan, shares


def finish(bench: Bench, sequence: Sequence) -> None:
    bench.scheduler.remove(sequence)
    bench.scheduler.release(sequence)

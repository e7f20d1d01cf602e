"""How an engine behaves, apart from the model it runs: the part of `LlmArgs` that the scheduler side reads."""

from __future__ import annotations

from dataclasses import dataclass

from pdserve.config import LlmArgs
from pdserve.config.llm_args import CapacitySchedulerPolicy, ContextChunkingPolicy
from pdserve.engine.schedule.drafts import Drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """See the fields of the same names in `LlmArgs` and its sections.

    `overlap`: launch each step before the one before it is collected, if the runner is asynchronous.
    `batch_wait_s`: how long prompts may wait for company while nothing runs.
    `drafter`: proposes up to `max_drafts` tokens that may follow a sequence, which its next step verifies.
    """

    max_queue_size: int = 4096
    enable_chunked_prefill: bool = True
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    copy_on_partial_reuse: bool = True
    overlap: bool = True
    capacity_policy: CapacitySchedulerPolicy = "MAX_UTILIZATION"
    chunking_policy: ContextChunkingPolicy = "FIRST_COME_FIRST_SERVED"
    max_mixed_prefill_tokens: int | None = None
    batch_wait_s: float = 0.0
    stream_interval: int = 1
    drafter: Drafter | None = None
    max_drafts: int = 4

    @classmethod
    def from_args(cls, args: LlmArgs) -> EngineOptions:
        cache, scheduler = args.kv_cache_config, args.scheduler_config
        return cls(
            max_queue_size=args.max_queue_size,
            enable_chunked_prefill=args.enable_chunked_prefill,
            enable_block_reuse=cache.enable_block_reuse,
            enable_partial_reuse=cache.enable_partial_reuse,
            copy_on_partial_reuse=cache.copy_on_partial_reuse,
            overlap=not args.disable_overlap_scheduler,
            capacity_policy=scheduler.capacity_scheduler_policy,
            chunking_policy=scheduler.context_chunking_policy,
            max_mixed_prefill_tokens=scheduler.max_mixed_prefill_tokens,
            batch_wait_s=args.batch_wait_timeout_ms / 1000,
            stream_interval=args.stream_interval,
        )

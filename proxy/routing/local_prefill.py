"""Whether a prompt is better computed by a generation worker than by a context worker (ADR 13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pdserve.config import ConditionalDisaggConfig
from proxy.fleet.link import WorkerLink

LOCAL_TOKEN_WEIGHT = 4
"""What a prompt token in a generation worker's line counts for, against one in a context worker's: next to decodes it
is computed at about half the speed, and all who decode wait for it."""

LocalReason = Literal["short", "queue", "no_context"]


class LocalPrefill:
    """The rule, as `conditional_disagg_config` sets it."""

    def __init__(self, config: ConditionalDisaggConfig) -> None:
        self._max_length = config.max_local_prefill_length
        self._max_queue_tokens = config.max_context_queue_tokens

    @property
    def is_possible(self) -> bool:
        """Whether there are prompts that need no context worker."""
        return self._max_length > 0 or self._max_queue_tokens is not None

    def is_short(self, num_tokens: int) -> bool:
        """Whether so few tokens are not worth a handoff."""
        return num_tokens <= self._max_length

    def takers(
        self, context: WorkerLink | None, generations: Sequence[WorkerLink]
    ) -> tuple[LocalReason | None, Sequence[WorkerLink]]:
        """Decide whether a generation worker computes a prompt, of whatever length.

        Args:
            context: the context worker that would compute it otherwise; None if there is none.

        Returns:
            The reason, and those of `generations` that may take it; or None and no worker, if the context worker does.
        """
        if self._max_queue_tokens is None or not generations:
            return None, ()
        if context is None:
            return "no_context", generations
        queues = [worker.load.pending_prefill_tokens for worker in generations]
        shortest = min(queues)
        if context.load.pending_prefill_tokens - LOCAL_TOKEN_WEIGHT * shortest <= self._max_queue_tokens:
            return None, ()
        return "queue", [worker for worker, queue in zip(generations, queues, strict=True) if queue == shortest]

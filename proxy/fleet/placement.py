"""Which worker takes a request, and whether a generation worker computes the prompt, too.

Owns the two policies and the rule for prompts, over anything that looks like a `Candidate`. Keeps no list of workers:
the fleet hands in those that are connected and ready.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal, Protocol, TypeVar

from pdserve.config import ConditionalDisaggConfig

LOCAL_TOKEN_WEIGHT = 4
"""What a prompt token in a generation worker's line counts for, against one in a context worker's: next to decodes it
is computed at about half the speed, and all who decode wait for it."""

Policy = Literal["round_robin", "least_loaded"]
LocalReason = Literal["short", "queue", "no_context"]


class Candidate(Protocol):
    """What a policy looks at.

    `open_requests` is the worker's requests, by its last report and by what this proxy submitted since;
    `pending_prefill_tokens` the prompt tokens among them whose first token is still to come.
    """

    @property
    def worker_id(self) -> str: ...
    @property
    def open_requests(self) -> int: ...
    @property
    def pending_prefill_tokens(self) -> int: ...


C = TypeVar("C", bound=Candidate)


class Placer:
    """Picks workers of one role, in turn among equals."""

    def __init__(self, policy: Policy, measure: Callable[[Candidate], int]) -> None:
        self._policy = policy
        self._measure = measure
        self._last = ""

    @classmethod
    def for_context(cls, policy: Policy) -> Placer:
        """Prompt tokens in line decide how long a prefill waits."""
        return cls(policy, lambda worker: worker.pending_prefill_tokens)

    @classmethod
    def for_generation(cls, policy: Policy) -> Placer:
        """The number of sequences decides how long a decode step takes."""
        return cls(policy, lambda worker: worker.open_requests)

    def pick(self, candidates: Sequence[C], avoid: Collection[str] = ()) -> C | None:
        """The worker to use, None if there is none. Those in `avoid` come last, whatever their load."""
        if not candidates:
            return None
        pool = [worker for worker in candidates if worker.worker_id not in avoid] or list(candidates)
        if self._policy == "least_loaded":
            least = min(self._measure(worker) for worker in pool)
            pool = [worker for worker in pool if self._measure(worker) == least]
        return self._in_turn(pool)

    def _in_turn(self, pool: Sequence[C]) -> C:
        """The first worker after the last one picked, by id; so nothing shifts when workers come and go."""
        chosen = min(pool, key=lambda worker: (worker.worker_id <= self._last, worker.worker_id))
        self._last = chosen.worker_id
        return chosen


class LocalPrefill:
    """Whether a prompt is better computed by a generation worker than by a context worker."""

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

    def takers(self, context: Candidate | None, generations: Sequence[C]) -> tuple[LocalReason | None, Sequence[C]]:
        """Why generation workers take a prompt of any length, and those of `generations` that may; or None and nobody.

        Args:
            context: who takes it otherwise; None if nobody can.
        """
        if self._max_queue_tokens is None or not generations:
            return None, ()
        if context is None:
            return "no_context", generations
        queue_tokens = context.pending_prefill_tokens
        shortest_tokens = min(worker.pending_prefill_tokens for worker in generations)
        if queue_tokens - LOCAL_TOKEN_WEIGHT * shortest_tokens <= self._max_queue_tokens:
            return None, ()
        return "queue", [worker for worker in generations if worker.pending_prefill_tokens == shortest_tokens]

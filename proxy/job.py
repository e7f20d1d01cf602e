"""All choices of one HTTP request.

Owns their common start, wake-up and end: the handler sleeps until any choice has news, looks at those that do, and
whatever happens to it, `abort` leaves nothing behind in the workers.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.errors import PdserveError
from proxy.choice import Choice, Prompt, TextOptions
from proxy.fleet.fleet import Fleet
from proxy.generation import Generation, GenerationSpec
from proxy.metrics import Metrics
from proxy.schemas.usage import UsageInfo, usage_of


@dataclass(frozen=True, slots=True)
class JobContext:
    """What a job needs of the service. `wake_on_tokens` is off where nobody reads before the end."""

    fleet: Fleet
    metrics: Metrics
    max_retries: int
    wake_on_tokens: bool


class Job:
    """The choices of one request.

    Args:
        arrival: `time.perf_counter()` when the request came in.
        deadline: when all choices must have ended, by the loop's clock.
    """

    def __init__(self, context: JobContext, arrival: float, deadline: float) -> None:
        self.arrival = arrival
        self.deadline = deadline
        self.choices: list[Choice] = []
        self._context = context
        self._changed: dict[int, None] = {}
        self._news = asyncio.Event()

    def add(self, prompt: Prompt, spec: GenerationSpec, options: TextOptions) -> None:
        """Add one choice; its index is the number of those before."""
        index, context = len(self.choices), self._context
        wake = functools.partial(self._wake, index)
        generation = Generation(spec, context.fleet, context.metrics, context.max_retries, wake, context.wake_on_tokens)
        self.choices.append(Choice(index, prompt, generation, options))

    def start(self) -> None:
        """Submit all choices.

        Raises:
            NotReady: there are no workers for it.
        """
        for choice in self.choices:
            choice.generation.start()
            self._context.metrics.prompt_tokens.inc(len(choice.prompt.token_ids))
        self._context.metrics.submit_overhead.observe(time.perf_counter() - self.arrival)

    async def changed(self) -> Sequence[Choice]:
        """Wait for news; the choices that have some."""
        await self._news.wait()
        self._news.clear()
        changed, self._changed = self._changed, {}
        return [self.choices[index] for index in changed]

    def abort(self) -> None:
        """Free the workers of whatever is still open."""
        for choice in self.choices:
            choice.generation.abort()

    def fail(self, error: PdserveError) -> None:
        """End whatever is still open with `error`."""
        for choice in self.choices:
            choice.generation.fail(error)

    def usage(self, n: int) -> UsageInfo:
        """Token counts; a prompt counts once for its `n` choices."""
        firsts = self.choices[::n]
        return usage_of(
            sum(len(choice.prompt.token_ids) for choice in firsts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.generation.cached_tokens for choice in firsts),
        )

    def _wake(self, index: int) -> None:
        self._changed[index] = None
        self._news.set()

"""All choices of one HTTP request.

`intake` makes it, `Service.running` starts and ends it, `routes.answer` reads it. Owns the common start, wake-up and
end of the choices. The handler sleeps in `changed` until a choice has news, and reads the choices that have some.
Whatever happens to the handler, `abort` frees the workers. News is passed on only after the frame that brought it has
been read to its end, so that a token and the end right behind it are seen together.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Collection

from pdserve.config import ProxyConfig
from pdserve.errors import PdserveError
from pdserve.text.tokenizer import Tokenizer
from proxy.choice import Choice
from proxy.fleet.fleet import Fleet
from proxy.generation import Generation, GenerationSpec
from proxy.metrics import Metrics
from proxy.plan import Plan, Prompt
from proxy.schemas.usage import UsageInfo, usage_of
from proxy.time_slice import TimeSlice


class Job:
    """The choices of one request. All must have ended by `deadline`, by the event loop's clock.

    Args:
        plan: what is asked. If the answer is streamed or has stop strings, tokens are news; otherwise only ends are.
        arrival: `time.perf_counter()` when the request came in.
        config: how long it may take, and how often a choice may be tried again.
        tokenizer: of the model.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        plan: Plan,
        *,
        arrival: float,
        config: ProxyConfig,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.plan = plan
        self.arrival = arrival
        self.deadline = asyncio.get_running_loop().time() + config.request_timeout_s
        self.choices: list[Choice] = []
        self._fleet = fleet
        self._metrics = metrics
        self._config = config
        self._tokenizer = tokenizer
        self._wake_on_tokens = plan.stream or bool(plan.stop)
        self._changed: dict[int, Choice] = {}
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._telling = False
        self._at_once: Callable[[Collection[Choice]], bool] | None = None
        self._failure: Exception | None = None

    def add(self, prompt: Prompt, spec: GenerationSpec) -> None:
        """Add one choice; its index is the number of those before."""
        index = len(self.choices)
        wake = functools.partial(self._wake, index)
        generation = Generation(spec, self._fleet, self._metrics, self._config, wake, self._wake_on_tokens)
        self.choices.append(Choice(index, prompt, generation, self._tokenizer, self.plan))

    async def start(self) -> None:
        """Submit all choices.

        Raises:
            NotReady: there are no workers for it.
        """
        time_slice = TimeSlice()
        for choice in self.choices:
            if not choice.generation.done:  # the whole job may have been ended meanwhile
                choice.generation.start()
                self._metrics.prompt_tokens.inc(len(choice.prompt.token_ids))
            await time_slice.pause()
        self._metrics.submit_overhead.observe(time.perf_counter() - self.arrival)

    def wake_at(self, moment: float) -> asyncio.TimerHandle:
        """Let `changed` return at `moment` by the event loop's clock, with or without news. The caller may cancel
        it."""
        return self._loop.call_at(moment, self._news.set)

    async def changed(self, at_once: Callable[[Collection[Choice]], bool] | None = None) -> Collection[Choice]:
        """Wait for news, and return the choices that have some; none if `wake_at` has ended the wait.

        Args:
            at_once: called with choices that have news, in a callback of the event loop, while this task goes on
                waiting: a callback takes 0.1 us, the wake-up of a task 0.97 us. If it returns False, or a choice has
                ended, the wait is over, and this returns the choices. None: every piece of news ends the wait.
        """
        self._at_once = at_once
        try:
            await self._news.wait()
        finally:
            self._at_once = None
        self._news.clear()
        if self._failure is not None:
            raise self._failure
        changed, self._changed = self._changed, {}
        return changed.values()

    def abort(self) -> None:
        """Free the workers of whatever is still open."""
        for choice in self.choices:
            choice.generation.abort()

    def fail(self, error: PdserveError) -> None:
        """End whatever is still open with `error`."""
        for choice in self.choices:
            choice.generation.fail(error)

    def usage(self) -> UsageInfo:
        """Token counts; a prompt counts once for all of its choices."""
        firsts = self.choices[:: self.plan.num_choices]
        return usage_of(
            sum(len(choice.prompt.token_ids) for choice in firsts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.generation.output.cached_tokens for choice in firsts),
        )

    def _wake(self, index: int) -> None:
        choice = self._changed[index] = self.choices[index]
        if self._at_once is None or choice.generation.done:
            self._news.set()
        elif not self._telling:
            self._telling = True
            self._loop.call_soon(self._tell)

    def _tell(self) -> None:
        """Call `at_once`, outside the handler's task. What it raises is raised in the handler, by `changed`."""
        self._telling = False
        at_once = self._at_once
        if at_once is None or self._news.is_set():
            return  # the handler looks at it, or has
        changed, self._changed = self._changed, {}
        try:
            if at_once(changed.values()):
                return
        except Exception as error:  # noqa: BLE001 - raised where the handler waits
            self._failure = error
        self._changed = changed | self._changed
        self._news.set()

"""All choices of one HTTP request.

Owns their common start, wake-up and end: the handler sleeps until any choice has news, looks at those that do, and
whatever happens to it, `abort` leaves nothing behind in the workers. News is looked at once the frames that brought it
have been taken in whole, so that a token and the end right behind it are seen together.
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
    """The choices of one request. All must have ended by `deadline`, of the loop's clock.

    Args:
        plan: what is asked. Tokens are news if they are streamed or may complete a stop string; else only ends are.
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
        """Let `changed` return by then, by the loop's clock, whether there is news or not; the caller may cancel it."""
        return self._loop.call_at(moment, self._news.set)

    async def changed(self, at_once: Callable[[Collection[Choice]], bool] | None = None) -> Collection[Choice]:
        """Wait for news; the choices that have some. There are none at the moment that `wake_at` named.

        Args:
            at_once: called with such choices while this waits, outside the waiting task; only an end ends the wait,
                or news for which it returns False. A task's wake-up takes 0.97 us, a callback 0.1 us.
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
        """The root of what happens outside the handler: a failure here becomes the handler's."""
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

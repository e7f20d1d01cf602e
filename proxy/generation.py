"""One choice's life from its first submission to its one end, however many attempts that takes.

A `Job` makes one for each choice. Owns the sequence of attempts: which workers serve the next one, when it follows, the
deadline, and the end. Does not own the life of an attempt (`Attempt`), whether another may follow (`RetryBudget`), text
(`choice`) or HTTP. It runs in callbacks of the workers' sockets and of the event loop's timers, and has no task.

Life cycle: `start`; then tokens appear in `output`, and `wake` is called, until `done`. It has ended with a `reason`,
with an `error`, or after `abort` with neither. Before that an attempt runs, or a pause passes before the next attempt,
or the choice waits until a worker that can serve it appears.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pdserve.config import ProxyConfig
from pdserve.errors import DeadlineExceeded, NotReady, Overloaded, PdserveError
from pdserve.protocol import GenerateRequest, Key, Phase, Sampling
from proxy.attempt import Attempt, Failure
from proxy.fleet.fleet import Fleet, Placement
from proxy.fleet.link import WorkerLink
from proxy.metrics import Metrics
from proxy.output import Output
from proxy.retry_budget import RetryBudget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What to generate.

    Attributes:
        request_id: of this choice, between proxy and workers.
        prompt_ids: the prompt's tokens.
        deadline: by the event loop's clock, in seconds.
        stop_ids: the tokens after which a worker ends the output.
        cache_salt: prompts share cached KV only with prompts of the same salt.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: Sampling
    deadline: float
    stop_ids: frozenset[int] = frozenset()
    cache_salt: str = ""


class Generation:
    """See the module.

    Args:
        spec: what to generate.
        fleet: chooses the workers.
        limits: how many failures and losses are followed by another attempt.
        wake: called when tokens have come and when the choice has ended.
        wake_on_tokens: False: `wake` is called at the end only.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        fleet: Fleet,
        metrics: Metrics,
        limits: ProxyConfig,
        wake: Callable[[], None],
        wake_on_tokens: bool = True,
    ) -> None:
        self.spec = spec
        self.done = False
        self.reason: Literal["stop", "length"] | None = None
        self.error: PdserveError | None = None
        self.output = Output()
        self._fleet = fleet
        self._metrics = metrics
        self._wake = wake
        self._on_tokens = wake if wake_on_tokens else None
        self._loop = asyncio.get_running_loop()
        self._budget = RetryBudget(limits)
        self._attempt: Attempt | None = None
        self._num_attempts = 0
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._pause_timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Submit the first attempt.

        Raises:
            NotReady: no worker can serve it.
        """
        placement = self._place()
        self._deadline_timer = self._loop.call_at(self.spec.deadline, self._expire)
        self._begin(placement)

    def abort(self) -> None:
        """End at once, because the client is gone or the text is complete. Frees both workers."""
        if not self.done:
            if self._deadline_timer is not None:  # it was started
                self._metrics.aborts.inc()
            self._finish()

    def fail(self, error: PdserveError) -> None:
        """End with `error`."""
        if not self.done:
            self.error = error
            self._finish()

    def _place(self) -> Placement:
        num_tokens = len(self.spec.prompt_ids) + len(self.output.tokens)
        needs_generation = self.spec.sampling.max_tokens - len(self.output.tokens) > 1
        return self._fleet.place(num_tokens, needs_generation, self._budget.avoid)

    def _begin(self, placement: Placement) -> None:
        """Submit the next attempt: the prompt followed by the tokens that earlier attempts have given."""
        if placement.local is not None:
            self._metrics.local_prefills.labels(placement.local).inc()
        key = Key(self.spec.request_id, self._num_attempts)
        self._num_attempts += 1
        self._attempt = Attempt(key, placement, self.output, self._on_tokens, self._on_over)
        spec, tokens = self.spec, self.output.tokens
        token_ids = spec.prompt_ids + tokens if tokens else spec.prompt_ids

        def request(phase: Phase, peer: WorkerLink | None) -> GenerateRequest:
            kv = None if peer is None else peer.info.kv
            return GenerateRequest(
                key=key,
                token_ids=token_ids,
                num_prompt_tokens=len(spec.prompt_ids),
                sampling=spec.sampling,
                timeout_s=max(0.001, spec.deadline - self._loop.time()),
                phase=phase,
                peer=None if kv is None else kv.address(),
                cache_salt=spec.cache_salt,
            )

        self._attempt.start(request)

    def _on_over(self, attempt: Attempt) -> None:
        if attempt.failure is not None:
            self._follow(attempt.key, attempt.failure)
        else:
            self.reason = attempt.reason
            self._finish()

    def _follow(self, key: Key, failure: Failure) -> None:
        """Decide what comes after attempt `key`, which failed: another one, or the end."""
        error = failure.error
        self._budget.charge(failure, bool(self.output.tokens), self._loop.time())
        if not error.retryable:
            self.fail(error)
        elif self._was_last_token():
            self._finish()
        elif self._budget.is_spent:
            log.warning("%s failed for good: %s", key, error)
            self.fail(error)
        else:
            log.info("%s failed and is tried again: %s", key, error)
            self._metrics.retries.labels(error.code).inc()
            self.output.forget_early()
            self._retry()

    def _was_last_token(self) -> bool:
        """Whether the output is complete, and only the message that says so was lost. Sets `reason` if it is."""
        count, sampling = len(self.output.tokens), self.spec.sampling
        if count >= sampling.max_tokens:
            self.reason = "length"
        elif count and count >= sampling.min_tokens and self.output.tokens[-1] in self.spec.stop_ids:
            self.reason = "stop"
        return self.reason is not None

    def _retry(self) -> None:
        """Submit the next attempt: now, or after a pause if only a worker that failed can take it, or when a worker
        that can take it appears."""
        try:
            placement = self._place()
            chosen = [link.worker_id for link in placement[:2] if link is not None]
            pause_s = self._budget.pause_s(chosen, self._loop.time())
        except NotReady:
            self._fleet.call_on_change(self._retry)
        except Overloaded as error:
            self.fail(error)
        else:
            if pause_s:
                self._pause_timer = self._loop.call_later(pause_s, self._retry)
            else:
                self._begin(placement)

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("the request did not finish within its time limit"))

    def _finish(self) -> None:
        """End the choice. Afterwards no worker has an attempt of it, and no timer runs."""
        self.done = True
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.withdraw()
            self._observe_gap(attempt)
        self._fleet.cancel_call(self._retry)
        for timer in (self._deadline_timer, self._pause_timer):
            if timer is not None:
                timer.cancel()
        if self.output.received_at is None:
            self.output.received_at = time.perf_counter()
        self._wake()

    def _observe_gap(self, attempt: Attempt) -> None:
        gap_s = None if attempt.gap is None or self.error is not None else attempt.gap.seconds()
        if gap_s is not None:
            self._metrics.handoff_gap.observe(gap_s)

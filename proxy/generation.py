"""One choice's life from its first submission to its one end, however many attempts that takes.

Owns the attempts: placement, submission to both workers, the merge of what they send, retries, the deadline, aborts.
Does not own text (`choice`) or HTTP. All of it runs in callbacks of the workers' sockets and the event loop's timers;
a request has no task of its own beside its HTTP handler.

Failures in a row without a new token use up the request's retries. A refusal (the worker drains, is full or not ready)
uses up none: the request goes to the next worker, and where nobody is left it asks again, less and less often, until
its deadline. One that has no token yet and finds everybody full is refused itself, so that its client can slow down.

Life cycle: `start`, then tokens appear in `tokens` and `wake` is called, until `done`; the end is a `reason`, or an
`error`, or neither after `abort`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pdserve.errors import (
    DeadlineExceeded,
    EngineError,
    NotReady,
    Overloaded,
    PdserveError,
    TransferError,
    WorkerLost,
    from_info,
)
from pdserve.protocol import Finished, GenerateRequest, Key, Phase, Sampling, TokenDelta, TokenLogprob
from proxy.fleet.fleet import Fleet, Placement
from proxy.fleet.link import WorkerLink
from proxy.handoff_gap import HandoffGap
from proxy.merge import TokenMerge
from proxy.metrics import Metrics

log = logging.getLogger(__name__)

_RETRY_PAUSE_S, _LONGEST_RETRY_PAUSE_S = 0.05, 2.0
"""Before a worker is asked again that has refused or failed; doubles while there is no new token."""
_PATIENCE_WITH_FULL_WORKERS_S = 5.0
_HANDOFF_GRACE_S = 0.1
"""How long the end waits for the context worker's own: it may be overtaken, and it has the cached tokens."""
_HEARSAY_GRACE_S = 1.0
"""The same where the generation worker was told that the context worker gave the handoff up: that one knows why."""


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What to generate. `deadline` is of the loop's clock. `stop_ids` are the tokens a worker ends the output with."""

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
        fleet: who can.
        max_retries: how many failures in a row without a new token are followed by another attempt.
        wake: called with every piece of news; only at the end if not `wake_on_tokens`.
    """

    def __init__(
        self,
        spec: GenerationSpec,
        fleet: Fleet,
        metrics: Metrics,
        max_retries: int,
        wake: Callable[[], None],
        wake_on_tokens: bool = True,
    ) -> None:
        self.spec = spec
        self.done = False
        self.reason: Literal["stop", "length"] | None = None
        self.error: PdserveError | None = None
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self.received_at: float | None = None
        self._fleet = fleet
        self._metrics = metrics
        self._max_retries = max_retries
        self._wake = wake
        self._wake_on_tokens = wake_on_tokens
        self._loop = asyncio.get_running_loop()
        self._merge = TokenMerge()
        self._gap: HandoffGap | None = None
        self._key = Key(spec.request_id, 0)
        self._known_before = 0
        self._failures = 0
        self._pauses = 0
        self._full: tuple[Overloaded, float] | None = None  # what was said, and until when it is put up with
        self._placement = Placement(None, None)
        self._open: set[WorkerLink] = set()
        self._avoid: set[str] = set()
        self._ending: Literal["stop", "length"] | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def tokens(self) -> list[int]:
        """The output so far, without gaps."""
        return self._merge.tokens

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One entry for each of `tokens`, if they were asked for."""
        return self._merge.logprobs

    def start(self) -> None:
        """Submit the first attempt.

        Raises:
            NotReady: there is nobody to submit it to.
        """
        placement = self._place()
        self._deadline_timer = self._loop.call_at(self.spec.deadline, self._expire)
        self._submit(placement)

    def abort(self) -> None:
        """End here and now: the client is gone, or the text is complete. Frees both workers."""
        if not self.done:
            if self._deadline_timer is not None:  # it was started
                self._metrics.aborts.inc()
            self._finish()

    def fail(self, error: PdserveError) -> None:
        """End with `error`."""
        if not self.done:
            self.error = error
            self._finish()

    def on_delta(self, link: WorkerLink, delta: TokenDelta, received_at: float) -> None:
        if delta.key != self._key or self.done:
            return
        if self._gap is not None:
            self._gap.note(delta.start, len(delta.token_ids), received_at)
        self._merge.add(delta)
        if delta.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = delta.prompt_logprobs
        if self.received_at is None:
            self.received_at = received_at
        if self._ending is not None:
            self._settle()
        if self._wake_on_tokens:
            self._wake()

    def on_finished(self, link: WorkerLink, finished: Finished) -> None:
        if finished.key != self._key or self.done:
            return
        self._open.discard(link)
        if finished.reason == "error":
            error = EngineError(f"{link.worker_id} failed") if finished.error is None else from_info(finished.error)
            context = self._placement.context
            if context is not None and self._is_hearsay(link, error):
                self._timer = self._loop.call_later(_HEARSAY_GRACE_S, self._end_attempt, context, error)
            else:
                self._end_attempt(link, error)
        elif finished.reason == "abort":
            self._end_attempt(link, WorkerLost(f"{link.worker_id} gave the request up"))
        else:
            if link is self._placement.context or self._placement.context is None:
                self.cached_tokens = self.cached_tokens or finished.usage.cached_tokens
            if finished.reason != "handoff":
                self._ending = finished.reason
            self._settle()

    def on_lost(self, link: WorkerLink) -> None:
        if link not in self._open or self.done:
            return
        self._open.discard(link)
        if link is self._placement.context and self._was_handed_off():
            self._settle()
        else:
            self._end_attempt(link, WorkerLost(f"the connection to {link.worker_id} was lost"))

    def _needs_generation(self) -> bool:
        return self.spec.sampling.max_tokens - len(self.tokens) > 1

    def _place(self) -> Placement:
        num_tokens = len(self.spec.prompt_ids) + len(self.tokens)
        return self._fleet.place(num_tokens, self._needs_generation(), self._avoid)

    def _was_handed_off(self) -> bool:
        """Whether the generation worker has all it needs: it has sent tokens that follow the first."""
        return len(self.tokens) > self._known_before + 1

    def _submit(self, placement: Placement) -> None:
        self._placement = placement
        handed_off = placement.context is not None and placement.generation is not None
        self._gap = HandoffGap() if handed_off and self._key.attempt == 0 else None
        self._known_before = len(self.tokens)
        self._ending = None
        context, generation, local = placement
        if local is not None:
            self._metrics.local_prefills.labels(local).inc()
        token_ids = self.spec.prompt_ids + self.tokens if self.tokens else self.spec.prompt_ids
        if context is not None:
            self._send(context, token_ids, "context", generation)
        if generation is not None:
            self._send(generation, token_ids, "both" if context is None else "generation", context)

    def _send(self, link: WorkerLink, token_ids: list[int], phase: Phase, peer: WorkerLink | None) -> None:
        self._open.add(link)
        kv = None if peer is None else peer.info.kv
        request = GenerateRequest(
            key=self._key,
            token_ids=token_ids,
            num_prompt_tokens=len(self.spec.prompt_ids),
            sampling=self.spec.sampling,
            timeout_s=max(0.001, self.spec.deadline - self._loop.time()),
            phase=phase,
            peer=None if kv is None else kv.address(),
            cache_salt=self.spec.cache_salt,
        )
        link.submit(request, self)

    def _settle(self) -> None:
        """Finish if the output is complete, and the context worker has said so too or had its time."""
        if self._ending is None or self._merge.has_gap or len(self.tokens) == self._known_before:
            return
        if self._placement.context not in self._open:
            self._complete()
        elif self._timer is None:
            self._timer = self._loop.call_later(_HANDOFF_GRACE_S, self._complete)

    def _complete(self) -> None:
        self.reason = self._ending
        self._finish()

    def _end_attempt(self, link: WorkerLink, error: PdserveError) -> None:
        self._withdraw()
        self._avoid |= self._culprits(link, error)
        self._count(error)
        if not error.retryable:
            self.fail(error)
        elif self._ended_by_tokens():
            self._complete()
        elif self._failures > self._max_retries:
            log.warning("%s failed for good: %s", self._key, error)
            self.fail(error)
        else:
            log.info("%s failed and is tried again: %s", self._key, error)
            self._metrics.retries.labels(error.code).inc()
            self._merge.forget_early()
            self._key = Key(self.spec.request_id, self._key.attempt + 1)
            self._retry()

    def _count(self, error: PdserveError) -> None:
        """What an attempt's end means for the next ones. Where there was progress, the count starts over."""
        if len(self.tokens) > self._known_before:
            self._failures, self._pauses, self._full = 0, 0, None
        if not isinstance(error, Overloaded | NotReady):
            self._failures += 1
        elif isinstance(error, Overloaded) and not self.tokens:
            until = self._loop.time() + _PATIENCE_WITH_FULL_WORKERS_S if self._full is None else self._full[1]
            self._full = error, until

    def _is_hearsay(self, link: WorkerLink, error: PdserveError) -> bool:
        """Whether this is what the context worker did, by way of the other. Its own word is still to come, and may be
        that the output ended with its first token."""
        context, generation, _ = self._placement
        gave_up = isinstance(error, TransferError) and error.reason == "aborted"
        return gave_up and link is generation and context in self._open

    def _culprits(self, link: WorkerLink, error: PdserveError) -> set[str]:
        """The workers to avoid: the one that reported, or if it has lost its peer, that. Of a handoff that was late or
        went wrong in another way, either may be the cause."""
        context, generation, _ = self._placement
        peer = generation if link is context else context
        if not isinstance(error, TransferError) or error.reason == "aborted" or peer is None:
            return {link.worker_id}
        return {peer.worker_id} if error.reason == "peer_lost" else {link.worker_id, peer.worker_id}

    def _ended_by_tokens(self) -> bool:
        """Whether only the word that it is the end got lost."""
        count, sampling = len(self.tokens), self.spec.sampling
        if count >= sampling.max_tokens:
            self._ending = "length"
        elif count and count >= sampling.min_tokens and self.tokens[-1] in self.spec.stop_ids:
            self._ending = "stop"
        else:
            self._ending = None
        return self._ending is not None

    def _retry(self) -> None:
        """Submit the next attempt as soon as somebody can take it; after a pause if it must be one that failed."""
        try:
            placement = self._place()
        except NotReady:
            self._fleet.call_on_change(self._retry)
            return
        unavoidable = {link.worker_id for link in placement[:2] if link is not None} & self._avoid
        if not unavoidable:
            self._submit(placement)
        elif self._full is not None and self._loop.time() >= self._full[1]:
            self.fail(self._full[0])
        else:
            self._avoid -= unavoidable
            pause_s = min(_RETRY_PAUSE_S * 2**self._pauses, _LONGEST_RETRY_PAUSE_S)
            self._pauses = min(self._pauses + 1, 16)
            self._timer = self._loop.call_later(pause_s * random.uniform(0.75, 1.25), self._retry)

    def _withdraw(self) -> None:
        """Abort what is open and forget what was planned."""
        for link in self._open:
            link.abort(self._key)
        self._open.clear()
        self._fleet.cancel_call(self._retry)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self.fail(DeadlineExceeded("the request did not finish within its time limit"))

    def _finish(self) -> None:
        self._withdraw()
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
        gap_s = None if self._gap is None or self.error is not None else self._gap.seconds()
        if gap_s is not None:
            self._metrics.handoff_gap.observe(gap_s)
        self.done = True
        if self.received_at is None:
            self.received_at = time.perf_counter()
        self._wake()

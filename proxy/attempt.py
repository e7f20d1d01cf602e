"""One attempt at a choice: a request at one or two workers, from its submission to its end.

`Generation` makes one after the other; a `WorkerLink` calls it with what its worker says. Owns the attempt's state, the
timer of that state, and which workers still have the request. Does not own the tokens (`Output`), nor what follows a
failed attempt (`Generation`). Runs in callbacks of the workers' sockets and of the event loop.

Life cycle: `start` submits the request. The attempt is over in one of the states "complete", "failed" and "withdrawn".
Then it aborts the request at the workers that still have it, and ignores what they say. `TRANSITIONS` is the whole
state machine: a pair of state and event that is not in it changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pdserve.errors import EngineError, PdserveError, TransferError, WorkerLost, from_info
from pdserve.protocol import Finished, GenerateRequest, Key, Phase, TokenDelta
from proxy.fleet.fleet import Placement
from proxy.fleet.link import WorkerLink
from proxy.handoff_gap import HandoffGap
from proxy.output import Output

State = Literal["running", "doubted", "ended", "whole", "complete", "failed", "withdrawn"]
"""
- running: no worker has said how the output ends.
- doubted: the generation worker says that the context worker gave up. The context worker's own message is still to
  come: perhaps the output ended with its first token.
- ended: a worker has said why the output ends, but a token before the end is missing.
- whole: every token is there. The context worker's own end is still to come, with the number of cached tokens.
- complete, failed, withdrawn: over.
"""

Event = Literal["end told", "hearsay", "fault", "all tokens", "all said", "time up", "withdrawal"]
"""
- end told: a worker ended the output ("stop" or "length").
- hearsay: the generation worker says that the context worker gave up.
- fault: a worker failed, gave up, or was lost while the attempt needed it.
- all tokens: no token up to the end is missing; the context worker has not ended the request yet.
- all said: no token up to the end is missing; the context worker has ended the request, or there is none.
- time up: the state has lasted for its `PATIENCE_S`.
- withdrawal: `Generation` does not need the attempt any more.
"""

TRANSITIONS: dict[tuple[State, Event], State] = {
    ("running", "end told"): "ended",
    ("running", "hearsay"): "doubted",
    ("running", "fault"): "failed",
    ("running", "withdrawal"): "withdrawn",
    ("doubted", "end told"): "ended",
    ("doubted", "fault"): "failed",
    ("doubted", "time up"): "failed",
    ("doubted", "withdrawal"): "withdrawn",
    ("ended", "all tokens"): "whole",
    ("ended", "all said"): "complete",
    ("ended", "fault"): "failed",
    ("ended", "withdrawal"): "withdrawn",
    ("whole", "all said"): "complete",
    ("whole", "fault"): "complete",
    ("whole", "time up"): "complete",
    ("whole", "withdrawal"): "withdrawn",
}

OVER: frozenset[State] = frozenset({"complete", "failed", "withdrawn"})

PATIENCE_S: dict[State, float] = {"doubted": 1.0, "whole": 0.1}
"""How long a state waits for the context worker's own message, which comes over another socket and may be later."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed.

    Attributes:
        error: what a worker said, or that it was lost.
        culprits: ids of the workers that the next attempt avoids.
        progressed: whether the attempt has given a token that was new.
        culprit_progressed: whether the worker at fault has given one itself.
    """

    error: PdserveError
    culprits: frozenset[str]
    progressed: bool
    culprit_progressed: bool


class Attempt:
    """See the module.

    Args:
        key: the attempt's.
        placement: the workers that serve it.
        output: gets the tokens. It may hold tokens of earlier attempts, which this one does not send again.
        on_tokens: called whenever tokens have come; None: never.
        on_over: called once, when the attempt is complete or has failed, but not when it is withdrawn.
    """

    def __init__(
        self,
        key: Key,
        placement: Placement,
        output: Output,
        on_tokens: Callable[[], None] | None,
        on_over: Callable[[Attempt], None],
    ) -> None:
        self.key = key
        self.state: State = "running"
        self.reason: Literal["stop", "length"] | None = None
        self.failure: Failure | None = None
        handed_over = placement.context is not None and placement.generation is not None
        self.gap = HandoffGap() if handed_over and key.attempt == 0 else None
        self._context, self._generation, _ = placement
        self._output = output
        self._on_tokens = on_tokens
        self._on_over = on_over
        self._known_before = len(output.tokens)
        self._open: set[WorkerLink] = set()
        self._cause: tuple[WorkerLink, PdserveError] | None = None
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, request: Callable[[Phase, WorkerLink | None], GenerateRequest]) -> None:
        """Submit the attempt to its workers. `request(phase, peer)` makes the message for one of them."""
        if self._context is not None:
            self._submit(self._context, request("context", self._generation))
        if self._generation is not None:
            self._submit(self._generation, request("both" if self._context is None else "generation", self._context))

    def withdraw(self) -> None:
        """End the attempt at once, if it is not over, and abort it at its workers."""
        self._happens("withdrawal")

    def on_delta(self, link: WorkerLink, delta: TokenDelta, received_at: float) -> None:
        if self._is_over:
            return
        if self.gap is not None:
            self.gap.note(delta.start, len(delta.token_ids), received_at)
        output = self._output
        output.add(delta)
        if output.received_at is None:
            output.received_at = received_at
        if self.state == "ended":
            self._settle()
        if self._on_tokens is not None:
            self._on_tokens()

    def on_finished(self, link: WorkerLink, finished: Finished) -> None:
        if self._is_over:
            return
        self._open.discard(link)
        if finished.reason == "error":
            error = EngineError(f"{link.worker_id} failed") if finished.error is None else from_info(finished.error)
            context = self._context
            if context is not None and self._is_hearsay(link, error):
                self._happens("hearsay", (context, error))
            else:
                self._happens("fault", (link, error))
        elif finished.reason == "abort":
            self._happens("fault", (link, WorkerLost(f"{link.worker_id} gave the request up")))
        else:
            if link is self._context or self._context is None:
                self._output.cached_tokens = self._output.cached_tokens or finished.usage.cached_tokens
            if finished.reason != "handoff":
                self.reason = finished.reason
                self._happens("end told")
            self._leave(link)

    def on_lost(self, link: WorkerLink) -> None:
        if link not in self._open:
            return
        self._open.discard(link)
        if link is self._context and self._generation is not None and self._has_given(self._generation):
            self._leave(link)  # the handoff was over
        else:
            self._happens("fault", (link, WorkerLost(f"the connection to {link.worker_id} was lost")))

    def _submit(self, link: WorkerLink, request: GenerateRequest) -> None:
        self._open.add(link)
        link.submit(request, self)

    def _happens(self, event: Event, cause: tuple[WorkerLink, PdserveError] | None = None) -> None:
        """Change the state, and with it the timer; nothing else does. `cause` is who reported a fault, and its
        error."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            return
        self.state = state
        self._cause = cause or self._cause
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if state in PATIENCE_S:
            self._timer = asyncio.get_running_loop().call_later(PATIENCE_S[state], self._happens, "time up")
        if state in OVER:
            self._end()

    def _end(self) -> None:
        self._is_over = True
        for link in self._open:
            link.abort(self.key)
        self._open.clear()
        if self.state == "failed" and self._cause is not None:
            self.failure = self._blame(*self._cause)
        if self.state != "withdrawn":
            self._on_over(self)

    def _settle(self) -> None:
        """If the tokens up to the end are all there, go on to the next state."""
        if self._num_new and not self._output.has_gap:
            self._happens("all tokens" if self._context in self._open else "all said")

    def _leave(self, link: WorkerLink) -> None:
        """`link` has done its part. If no other worker is left and tokens are missing, the attempt has failed."""
        if self.state in ("ended", "whole"):
            self._settle()
        if not self._open and not self._is_over:
            incomplete = EngineError(f"{link.worker_id} ended the request before all of its tokens were there")
            self._happens("fault", self._cause or (link, incomplete))

    def _is_hearsay(self, link: WorkerLink, error: PdserveError) -> bool:
        """Whether `link` is the generation worker and only reports that the context worker gave up, which has not said
        so itself yet."""
        gave_up = isinstance(error, TransferError) and error.reason == "aborted"
        return gave_up and link is self._generation and self._context in self._open

    def _blame(self, link: WorkerLink, error: PdserveError) -> Failure:
        """Make the `Failure`. The worker at fault is `link`, which reported the error; or its peer, if `link` lost it.
        Any other error of a handoff may be due to either, so both are culprits."""
        peer = self._generation if link is self._context else self._context
        culprits = {link.worker_id}
        if isinstance(error, TransferError) and error.reason != "aborted" and peer is not None:
            culprits.add(peer.worker_id)
            if error.reason == "peer_lost":
                culprits.discard(link.worker_id)
                link = peer
        return Failure(error, frozenset(culprits), self._num_new > 0, self._has_given(link))

    @property
    def _num_new(self) -> int:
        return len(self._output.tokens) - self._known_before

    def _has_given(self, link: WorkerLink) -> bool:
        """Whether a new token came from `link`. The first is the context worker's, if there is one; the others are the
        generation worker's."""
        return self._num_new > (1 if link is self._generation and self._context is not None else 0)

"""Whether, when and where a choice may be tried again after an attempt has failed.

Owns the counts of one choice, each with its own limit, and the workers to avoid. Three causes are told apart:

- *Refusals*: the worker drains, is full or not ready. They cost nothing. Where a worker can't be avoided it is asked
  again after a pause, which doubles while there is no new token. A choice that has no
  token yet and finds everybody full waits for `FULL_PATIENCE_S`; then it is refused, so that its client slows down.
- *Losses*: a worker is gone, by chance or because the choice kills its workers. A choice that does gets no token out
  of the worker that it kills next. So a lost worker that gave the choice a token in this attempt starts the count over;
  the first token, which the context worker gives, does not speak for the generation worker.
- *Failures*: everything else. A new token, whoever gave it, starts their count over.
"""

from __future__ import annotations

import random
from collections.abc import Collection

from pdserve.config import ProxyConfig
from pdserve.errors import NotReady, Overloaded, TransferError, WorkerLost
from proxy.attempt import Failure

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
"""Before a worker is asked again that has refused or failed."""
FULL_PATIENCE_S = 5.0


class RetryBudget:
    """One choice's. Times are of the event loop's clock.

    `avoid` are ids of the workers to take only if there are no others. `limits` has `max_retries` and
    `max_worker_losses`: how many in a row are followed by another attempt.
    """

    def __init__(self, limits: ProxyConfig) -> None:
        self.avoid: set[str] = set()
        self._limits = limits
        self._failures = 0
        self._losses = 0
        self._pause_s = FIRST_PAUSE_S
        self._full: tuple[Overloaded, float] | None = None  # what was said, and until when it is put up with

    @property
    def is_spent(self) -> bool:
        return self._failures > self._limits.max_retries or self._losses > self._limits.max_worker_losses

    def charge(self, failure: Failure, has_tokens: bool, now: float) -> None:
        """Count an attempt's failure. `has_tokens` says whether the choice has any token by now."""
        self.avoid |= failure.culprits
        error = failure.error
        if failure.progressed:
            self._failures, self._pause_s, self._full = 0, FIRST_PAUSE_S, None
        if failure.culprit_progressed:
            self._losses = 0
        if isinstance(error, Overloaded):
            if not has_tokens:
                self._full = error, now + FULL_PATIENCE_S if self._full is None else self._full[1]
        elif isinstance(error, WorkerLost) or (isinstance(error, TransferError) and error.reason == "peer_lost"):
            self._losses += 1
        elif not isinstance(error, NotReady):
            self._failures += 1

    def pause_s(self, worker_ids: Collection[str], now: float) -> float:
        """How long to wait before `worker_ids` are asked, 0 if none of them is to be avoided. After the pause they are
        avoided no more.

        Raises:
            Overloaded: they have been full for too long.
        """
        unavoidable = self.avoid.intersection(worker_ids)
        if not unavoidable:
            return 0.0
        if self._full is not None and now >= self._full[1]:
            raise self._full[0]
        self.avoid -= unavoidable
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s * random.uniform(0.75, 1.25)

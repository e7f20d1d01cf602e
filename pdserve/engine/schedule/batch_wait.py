"""How long prompts wait for company while nothing runs, so that the first step is a full one.

Owns the instant until which they are held back; the waiting queue is the scheduler's.
"""

from __future__ import annotations

from collections.abc import Collection

from pdserve.engine.schedule.sequence import Sequence


class BatchWait:
    """`wait_s` counts from the receipt of the oldest prompt; `max_batch_size` of them wait no longer.

    `until_s` is when those held back may start, None while none are.
    """

    def __init__(self, wait_s: float, max_batch_size: int) -> None:
        self.until_s: float | None = None
        self._wait_s = wait_s
        self._max_batch_size = max_batch_size

    def holds(self, waiting: Collection[Sequence], running: Collection[Sequence], now_s: float) -> bool:
        """Whether `waiting`, oldest first, should wait for more. Those who run would only be slowed down by that."""
        self.until_s = None
        if not self._wait_s or not waiting or running or len(waiting) >= self._max_batch_size:
            return False
        until_s = next(iter(waiting)).milestones.received_s + self._wait_s
        if now_s >= until_s:
            return False
        self.until_s = until_s
        return True

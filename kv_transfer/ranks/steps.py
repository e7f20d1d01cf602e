"""Counts the steps that a rank's engine has launched, so that a call which relies on a step waits for it on every rank.

Rank 0 says that KV is computed, or that blocks may be written, when *it* has launched a step. A follower may launch
that step later: until then its KV is not there, or its own attention still reads those blocks. So such a call carries
rank 0's count, and a follower holds it back until it has launched as many steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kv_transfer.mark_poller import Mark

KEPT = 16
"""The marks of so many of the last steps are kept. What relies on an older step waits for a newer one, which is
later."""


class Steps:
    """`take_mark` is asked in the engine's thread, `on_launched` told there."""

    def __init__(self) -> None:
        self.count = 0
        self.take_mark: Callable[[], Mark] = lambda: None
        self.on_launched: Callable[[], None] = lambda: None
        self._marks: deque[tuple[int, Mark]] = deque(maxlen=KEPT)

    def launched(self) -> None:
        """A step, or a batch of copies, was launched on this rank, on the current stream. The same number of times on
        every rank."""
        self._marks.append((self.count + 1, self.take_mark()))
        self.count += 1
        self.on_launched()

    def mark_of(self, step: int) -> Mark:
        """Where the engine's stream stood after its first `step` steps, or later. They have been launched."""
        marks = list(self._marks)
        return next((mark for number, mark in marks if number >= step), None) if step else None

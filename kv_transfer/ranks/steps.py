"""Counts the steps that a rank's engine has launched, so that no rank does what relies on a step before that step.

Rank 0 says that KV is computed, or that blocks are free to be written, when *it* has launched a step. A follower may
still be about to: then the KV is not there yet, or its own attention still reads those blocks. So rank 0 names its
count with such a call, and a follower waits until it has launched as many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from kv_transfer.mark_poller import Mark

KEPT = 16
"""Marks of the last steps that are kept apart; what relies on an older step waits for a newer one, and is as right."""


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

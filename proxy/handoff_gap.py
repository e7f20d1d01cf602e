"""What the handoff cost a client: the gap between the first token, which comes from the context worker, and those that
follow it from the generation worker, less what they would have taken anyway.

All times are of one clock, the proxy's, at the receipt of each worker's frames.
"""

from __future__ import annotations

import statistics

MIN_STEPS = 4
"""Steps of the generation worker without which the pace of a choice is not known."""

_MAX_STEPS = 64


class HandoffGap:
    """Times of one attempt's tokens. The pace is the median of the first `_MAX_STEPS` steps after the gap."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._ends: list[tuple[int, float]] = []

    def note(self, start: int, num_tokens: int, received_at: float) -> None:
        """Output tokens from number `start` on have come, the first token being number 0. What comes again, or after
        its successors, is no step and does not count."""
        end = start + num_tokens
        if start == 0:
            self._first_at = received_at if self._first_at is None else self._first_at
        elif len(self._ends) <= _MAX_STEPS and end > (self._ends[-1][0] if self._ends else start):
            self._ends.append((end, received_at))

    def seconds(self) -> float | None:
        """The gap, less the time in which the generation worker makes as many tokens as ended it; never negative.

        None if there was no gap, or too little is known of the pace.
        """
        if self._first_at is None or len(self._ends) <= MIN_STEPS:
            return None
        steps = zip(self._ends, self._ends[1:], strict=False)
        step_s = statistics.median((at - before) / (end - start) for (start, before), (end, at) in steps)
        end, at = self._ends[0]
        return max(0.0, at - self._first_at - (end - 1) * step_s)

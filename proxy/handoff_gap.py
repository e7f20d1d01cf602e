"""Measures what a handoff cost a client: the gap between the first token, which the context worker sends, and the next
ones, which the generation worker sends, less the time that these would have taken without a handoff.

An `Attempt` notes the tokens, `Generation` reads the result for a metric. All times are by the proxy's clock, when a
worker's frame was received.
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
        """Note that output tokens from number `start` on have come; the first token is number 0. Tokens that come
        again, or after their successors, do not count."""
        end = start + num_tokens
        if start == 0:
            self._first_at = received_at if self._first_at is None else self._first_at
        elif len(self._ends) <= _MAX_STEPS and end > (self._ends[-1][0] if self._ends else start):
            self._ends.append((end, received_at))

    def seconds(self) -> float | None:
        """The gap, less the time that the generation worker takes for the tokens that came at its end; at least 0.

        None if there was no gap, or if too few tokens came to know the generation worker's pace.
        """
        if self._first_at is None or len(self._ends) <= MIN_STEPS:
            return None
        steps = zip(self._ends, self._ends[1:], strict=False)
        step_s = statistics.median((at - before) / (end - start) for (start, before), (end, at) in steps)
        end, at = self._ends[0]
        return max(0.0, at - self._first_at - (end - 1) * step_s)

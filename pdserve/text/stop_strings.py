"""Stop strings in streamed text.

Owns the text that may still turn into a stop string; everything before it is released at once. The result does not
depend on how the text was cut into pieces: the stop string that is complete first wins, and of several that end at
the same character the longest.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Watches one choice's text.

    Args:
        stops: non-empty strings that end the text.
        include: whether the stop string itself belongs to the text.

    `hit` is the stop string that was found.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self.hit: str | None = None
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """The text that is certain after `text` arrived, and whether a stop string is complete.

        After a hit nothing may be pushed any more.
        """
        buffer = self._held + text
        hit = self._first_hit(buffer)
        if hit is not None:
            self._held = ""
            start, end = hit
            self.hit = buffer[start:end]
            return buffer[: end if self._include else start], True
        held = self._held_length(buffer)
        self._held = buffer[len(buffer) - held :]
        return buffer[: len(buffer) - held], False

    def flush(self) -> str:
        """The text held back, now that no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_hit(self, buffer: str) -> tuple[int, int] | None:
        best: tuple[int, int] | None = None
        for stop in self._stops:
            start = buffer.find(stop)
            if start < 0:
                continue
            end = start + len(stop)
            if best is None or (end, start) < (best[1], best[0]):
                best = (start, end)
        return best

    def _held_length(self, buffer: str) -> int:
        """Length of the longest suffix of `buffer` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(buffer)), longest, -1):
                if buffer.endswith(stop[:length]):
                    longest = length
                    break
        return longest

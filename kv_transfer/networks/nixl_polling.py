"""Looks again and again from an asyncio loop, for networks that have nothing to wait on.

NIXL shows its user no descriptor to wait for, and its own progress thread takes most of a core even while nothing
happens. So it is polled, but only while something is under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SPIN_S = 0.002
"""How long to look in every turn of the loop after the last sign of life: about as long as a message takes."""

SLEEP_S = 0.001


class Polling:
    """Calls `look` from the running loop, from each `wake` on for as long as it returns True."""

    def __init__(self, look: Callable[[], bool]) -> None:
        self._look = look
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Handle | None = None
        self._stopped = False
        self._active_at_s = 0.0

    def wake(self) -> None:
        """Something is under way, or has just come."""
        self._active_at_s = time.monotonic()
        if isinstance(self._next, asyncio.TimerHandle):
            self._next.cancel()
            self._next = None
        if self._next is None and not self._stopped:
            self._next = self._loop.call_soon(self._run)

    def stop(self) -> None:
        self._stopped = True
        if self._next is not None:
            self._next.cancel()

    def _run(self) -> None:
        self._next = None
        if not self._look() or self._stopped or self._next is not None:
            return
        if time.monotonic() - self._active_at_s < SPIN_S:
            self._next = self._loop.call_soon(self._run)
        else:
            self._next = self._loop.call_later(SLEEP_S, self._run)

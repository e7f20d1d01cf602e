"""Checks an engine's counts of blocks while the engine is idle.

Every host of an engine calls it between steps. A check begins when the engine has been idle for a while, and goes on a
slice at a time, so that a request that comes meanwhile waits for one slice at most. After that request, the check
starts over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from pdserve.engine.schedule.engine import Engine

QUIET_S = 1.0


class IdleCheck:
    """One engine's; `clock` tells monotonic seconds."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._due = False
        self._idle_since_s: float | None = None
        self._slices: Iterator[None] | None = None

    def note_work(self) -> None:
        """The engine has done something: its books are to be checked, again."""
        self._due, self._idle_since_s, self._slices = True, None, None

    def run_slice(self) -> float | None:
        """Check a part, if it is time; to be called when the host has nothing to do.

        Returns the seconds after which it is to be called again; None if there is nothing left to check.

        Raises:
            BrokenInvariant: the books are wrong.
        """
        if not self._due or not self._engine.is_idle:
            return None
        if self._idle_since_s is None:
            self._idle_since_s = self._clock()
        wait_s = self._idle_since_s + QUIET_S - self._clock()
        if wait_s > 0:
            return wait_s
        if self._slices is None:
            self._slices = self._engine.checks()
        for _ in self._slices:
            return 0.0
        self._due = False
        return None

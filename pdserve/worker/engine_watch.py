"""Watches whether the engine's process runs: it sends a heartbeat twice a second, however long a step takes.

A frozen engine (a signal, a debugger, a host without memory) holds up all its requests. Its worker then does what a
worker does that is gone: it hangs up on the proxies, whose requests go on elsewhere, and lets its registration lapse.
When the engine speaks again, the worker comes back. An engine that stays silent for `GIVE_UP_S` is given up, and its
process killed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pdserve.errors import EngineError

log = logging.getLogger(__name__)

TICK_S = 0.25
GIVE_UP_S = 300.0


class EngineWatch:
    """Calls `on_silence` when the engine has been silent for `limit_s`.

    Silence is counted in ticks of this process's event loop, so that time in which this process was held up itself does
    not count as the engine's silence.
    """

    def __init__(self, limit_s: float, on_silence: Callable[[], Awaitable[None]]) -> None:
        self._limit_s = limit_s
        self._on_silence = on_silence
        self._silent_s = 0.0
        self.is_silent = False

    def heard(self) -> None:
        """A message of the engine has come."""
        self._silent_s = 0.0
        if self.is_silent:
            self.is_silent = False
            log.info("the engine answers again")

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            EngineError: the engine will not come back.
        """
        while True:
            await asyncio.sleep(TICK_S)
            self._silent_s += TICK_S
            if self._silent_s >= self._limit_s and not self.is_silent:
                self.is_silent = True
                log.error("the engine has been silent for %.1f s", self._silent_s)
                await self._on_silence()
            if self._silent_s >= max(GIVE_UP_S, self._limit_s):
                raise EngineError(f"the engine was silent for {self._silent_s:.0f} s")

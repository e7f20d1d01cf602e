"""Whether the engine's process runs, judged by what it says: it says something twice a second, however busy it is.

A frozen one (a signal, a debugger, a host without memory) holds up every request that it has. Its worker then acts as
one that is frozen as a whole: it hangs up on the proxies, which go on elsewhere, and lets its registration lapse; once
the engine speaks again it comes back. One that never does is given up, and its process killed.
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

    Silence is counted in ticks of this process's loop: time in which it was held up itself counts against nobody.
    """

    def __init__(self, limit_s: float, on_silence: Callable[[], Awaitable[None]]) -> None:
        self._limit_s = limit_s
        self._on_silence = on_silence
        self._silent_s = 0.0
        self.is_silent = False

    def heard(self) -> None:
        """The engine has said something."""
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

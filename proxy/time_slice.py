"""Long work of the event loop in slices, so that other requests and the workers' sockets never wait for all of it."""

from __future__ import annotations

import asyncio
import time

_SLICE_S = 0.005


class TimeSlice:
    """Call `pause` between the parts of one long piece of work; it lets others run when the slice is used up."""

    __slots__ = ("_ends_at",)

    def __init__(self) -> None:
        self._ends_at = time.perf_counter() + _SLICE_S

    async def pause(self) -> None:
        if time.perf_counter() >= self._ends_at:
            await asyncio.sleep(0)
            self._ends_at = time.perf_counter() + _SLICE_S

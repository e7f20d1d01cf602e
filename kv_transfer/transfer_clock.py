"""Bounds the time in which a handoff has KV to transfer and has not transferred it.

Waiting is not transferring: neither the prefill that computes KV nor the receiver's queue for blocks counts. Those end
with the request, whose deadline is its engine's.

Life cycle: made with its handoff → runs while any part of it has something to transfer → `stop`, with the handoff.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pdserve.errors import TransferError

HEARING_S = 0.02
"""Between the moment in which the time is up and the end."""


class TransferClock:
    """Calls `on_expired` with "timeout" when a part has had something to transfer for `limit_s`, from when the last of
    it came. Belongs to the transceiver's loop. One timer, set as the handoff begins, looks again when it was early: so
    that the moments in which KV moves cost next to nothing."""

    def __init__(self, limit_s: float, on_expired: Callable[[TransferError], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit_s = limit_s
        self._on_expired = on_expired
        self._busy: set[object] = set()
        self._due_at_s = 0.0
        self._warned = False
        self._timer = self._loop.call_later(limit_s, self._look)

    def more(self, part: object) -> None:
        """`part` of the handoff has more to transfer than before."""
        self._busy.add(part)
        self._due_at_s = time.monotonic() + self._limit_s
        self._warned = False

    def none_left(self, part: object) -> None:
        """All that `part` had is transferred."""
        self._busy.discard(part)

    def stop(self) -> None:
        """The handoff is over."""
        self._timer.cancel()

    def _look(self) -> None:
        left_s = self._due_at_s - time.monotonic() if self._busy else self._limit_s
        if left_s > 0 or not self._warned:
            # If this thread was held up, what has come meanwhile is still to be heard.
            self._warned = left_s <= 0
            self._timer = self._loop.call_later(max(left_s, HEARING_S), self._look)
        else:
            self._on_expired(TransferError(f"the transfer took longer than {self._limit_s:g} s", "timeout"))

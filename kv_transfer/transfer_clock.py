"""Bounds the time in which a handoff has KV to transfer and has not transferred it.

Each `Export` and `Import` has a `TransferClock`. Waiting does not count: neither for the prefill that computes KV, nor
for the receiver's blocks. Both end with the request, whose deadline the engine watches.

Life cycle: made with its handoff → runs while any part of it has something to transfer → `stop`, with the handoff.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from pdserve.errors import TransferError

HEARING_S = 0.02
"""How long after its time is up a handoff is ended: what has arrived by then is still read."""


class TransferClock:
    """Calls `on_expired` with a "timeout" when parts of a handoff have had something to transfer for `limit_s` seconds,
    counted from the last `more`.

    Belongs to the transceiver's loop. There is one timer a handoff. If it fires before the time is up, it is set anew,
    so that `more` and `none_left`, which are called for every piece, cost next to nothing.
    """

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

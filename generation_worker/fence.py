"""Remembers which attempts are over, so that a late offer of one is refused.

A record is kept for `lifetime_s`, the longest that an offer can be under way.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from pdserve.protocol import Key


class AttemptFence:
    """The newest attempt of each request that has ended here or was aborted before it came."""

    def __init__(self, lifetime_s: float) -> None:
        self._lifetime_s = lifetime_s
        self._closed: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def close(self, key: Key) -> None:
        """Refuse `key` and older attempts of its request from now on."""
        self._forget_old()
        attempt, _ = self._closed.pop(key.request_id, (key.attempt, 0.0))
        self._closed[key.request_id] = (max(attempt, key.attempt), time.monotonic())

    def refuses(self, key: Key) -> bool:
        self._forget_old()
        attempt, _ = self._closed.get(key.request_id, (key.attempt - 1, 0.0))
        return key.attempt <= attempt

    def _forget_old(self) -> None:
        horizon_s = time.monotonic() - self._lifetime_s
        while self._closed and next(iter(self._closed.values()))[1] < horizon_s:
            self._closed.popitem(last=False)

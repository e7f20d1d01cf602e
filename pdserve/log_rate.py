"""Log lines that a peer can cause at will: one now and then, with the number of those left out."""

from __future__ import annotations

import logging
import math
import time

INTERVAL_S = 10.0


class OccasionalLog:
    """At most one line in `INTERVAL_S`, at `level` of `logger`. For one kind of event."""

    def __init__(self, logger: logging.Logger, level: int) -> None:
        self._logger = logger
        self._level = level
        self._last_at = -math.inf
        self._left_out = 0

    def log(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if now - self._last_at < INTERVAL_S:
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        self._last_at = now
        if left_out:
            message += f" (and {left_out} more of its kind since the last such line)"
        self._logger.log(self._level, message, *args)

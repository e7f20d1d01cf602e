"""Whether this process has file descriptors left for a further link, and the wait until it has.

A process without any can accept nobody, and UCX can't make a worker. That is no reason to end: descriptors come back
when connections close. Belongs to one event loop; `hindrance` may be read from any thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable

from pdserve.errors import TransferError

log = logging.getLogger(__name__)

LINK_DESCRIPTORS = 32
"""More than a link takes: 12 over the loopback interface, 14 with another one."""

PROBE_INTERVAL_S = 0.25

OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Descriptors:
    """`hindrance` says why no link can be made for the moment; it is empty otherwise."""

    def __init__(self) -> None:
        self.hindrance = ""
        self._waiting: list[Callable[[], None]] = []
        self._timer: asyncio.TimerHandle | None = None

    def require(self) -> None:
        """Raises `TransferError` "refused" if there are too few descriptors for a link."""
        if (cause := _missing()) is not None:
            self.ran_out(cause)
            raise TransferError(self.hindrance, "refused")

    def ran_out(self, cause: OSError) -> None:
        """Something has failed for want of descriptors: look again, every `PROBE_INTERVAL_S`, until there are some."""
        if self._timer is None:
            self.hindrance = f"no further connection can be made: {cause.strerror}"
            log.error("%s", self.hindrance)
            self._look_later()

    def when_there_are_some(self, callback: Callable[[], None]) -> None:
        """Call `callback` once there are enough again. Only after `ran_out`."""
        self._waiting.append(callback)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._waiting.clear()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(PROBE_INTERVAL_S, self._look)

    def _look(self) -> None:
        if _missing() is not None:
            self._look_later()
            return
        self._timer, self.hindrance = None, ""
        log.info("connections can be made again")
        waiting, self._waiting = self._waiting, []
        for callback in waiting:
            callback()


def _missing() -> OSError | None:
    """Why this process can't open as many descriptors as a link takes."""
    with contextlib.ExitStack() as opened:
        try:
            for _ in range(LINK_DESCRIPTORS):
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            return error
    return None

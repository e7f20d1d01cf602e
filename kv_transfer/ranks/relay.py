"""Frames between rank 0 and its followers: the interface, and one between threads of a process, for tests.

What rank 0 sends goes to every follower, what a follower sends to rank 0. Frames come whole and in order. A relay is
started in its transceiver's loop and belongs to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

from pdserve.errors import MalformedMessage, TransferError

log = logging.getLogger(__name__)


class Relay(Protocol):
    """One rank's end."""

    def start(self, on_frame: Callable[[bytes], None]) -> None:
        """Deliver to `on_frame`, in the running loop."""

    def send(self, frame: bytes) -> None:
        """Queue `frame`; never blocks. What is sent to a rank before it has started waits for it."""

    def close(self) -> None: ...


def guarded(take: Callable[[bytes], None], fail: Callable[[TransferError], None]) -> Callable[[bytes], None]:
    """`take` as the root of what another rank sets off: a rank that can't do as it is told is at odds with the others,
    and fails."""

    def on_frame(frame: bytes) -> None:
        try:
            take(frame)
        except MalformedMessage as error:
            fail(TransferError(f"another rank of this worker makes no sense: {error}", "protocol"))
        except Exception as error:
            log.exception("what another rank of this worker said could not be dealt with")
            fail(TransferError(f"the ranks of this worker are at odds: {type(error).__name__}", "aborted"))

    return on_frame


class InProcessRelay:
    """One end between transceivers of one process; `in_process` makes all of them."""

    def __init__(self) -> None:
        self.others: list[InProcessRelay] = []
        self._early: list[bytes] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_frame: Callable[[bytes], None] = self._early.append
        self._closed = False

    def start(self, on_frame: Callable[[bytes], None]) -> None:
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._take_early)

    def send(self, frame: bytes) -> None:
        for other in self.others:
            other.deliver(frame)

    def deliver(self, frame: bytes) -> None:
        """From the sender's thread."""
        self._early.append(frame)
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # that loop has ended, and takes nothing any more
                self._loop.call_soon_threadsafe(self._take_early)

    def close(self) -> None:
        self._closed = True

    def _take_early(self) -> None:
        while self._early and not self._closed:
            self._on_frame(self._early.pop(0))


def in_process(num_ranks: int) -> list[InProcessRelay]:
    """The ends of `num_ranks` ranks; the first is rank 0's."""
    leader, *followers = (InProcessRelay() for _ in range(num_ranks))
    leader.others = followers
    for follower in followers:
        follower.others = [leader]
    return [leader, *followers]

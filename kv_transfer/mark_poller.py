"""Calls back when a point on a device's stream is reached. An event loop can't wait for that, so `MarkPoller` polls.

A `Mark` is a point on a stream: when it is reached, everything launched before it has run. On a CPU everything before
has run already, and a mark is None. Polling without a pause takes the interpreter from the engine's thread. So a mark
is polled that way only while a peer waits for it, and only when it is about to be reached.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

log = logging.getLogger(__name__)

SPIN_S = 0.0003
"""Copies take tens of microseconds: polling that long beats sleeping, whose grain is a millisecond."""

PAUSE_S = 0.00005
"""The pause between two looks while something is due, but not yet near."""

NEAR_S = 0.00015
"""Within so many seconds before something is due there is no pause: one may last twice as long as asked for."""

LATE_S = 0.001
"""How much later than expected a transfer may end before it is polled with pauses: others may share the link."""

SLEEP_S = 0.001
"""The pause between two looks while nothing is due."""


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def query(self) -> bool: ...


Mark = DeviceEvent | None
Then = Callable[[Exception | None], None]


def is_reached(mark: Mark) -> bool:
    """Whether everything before `mark` has run. False if the device has failed."""
    try:
        return mark is None or mark.query()
    except RuntimeError:
        return False


class _Due(NamedTuple):
    at_s: float
    until_s: float


class MarkPoller:
    """Polls in `loop`, to whose thread all calls belong. It `spins` where things are too quick to sleep meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop, spins: bool) -> None:
        self._loop = loop
        self._spins = spins
        self._waiting: list[tuple[DeviceEvent, Then]] = []
        self._due: dict[object, _Due] = {}
        self._spins_until_s = 0.0
        self._scheduled = False
        self._timer: asyncio.TimerHandle | None = None

    def when(self, mark: Mark, then: Then, soon: bool = False) -> None:
        """Call `then` once `mark` is reached: at once if it is, or there is none. It gets what the device says if it
        has failed. If that should be `soon`, look without a pause at first, else now and then. The device bounds this
        wait: a kernel that never ends can't be taken back."""
        if mark is None:
            then(None)
            return
        if soon:
            self._spins_until_s = time.monotonic() + SPIN_S
        elif self._try(mark, then):
            return
        self._waiting.append((mark, then))
        self._schedule(soon)

    def stay_awake(self, owner: object, seconds: float, late_s: float = LATE_S) -> None:
        """What `owner` waits for takes `seconds`, after what others wait for: a thread that sleeps is late for it.
        Until `rest`, or `late_s` after that."""
        if not self._spins:
            return
        due_s = max(time.monotonic(), *(due.at_s for due in self._due.values()), 0.0) + seconds
        self._due[owner] = _Due(due_s, due_s + late_s)
        self._schedule(soon=True)

    def rest(self, owner: object) -> None:
        """It is here."""
        self._due.pop(owner, None)

    def _schedule(self, soon: bool) -> None:
        if self._scheduled:
            return
        if soon:
            if self._timer is not None:
                self._timer.cancel()
            self._scheduled, self._timer = True, None
            self._loop.call_soon(self._poll)
        elif self._timer is None:
            self._timer = self._loop.call_later(SLEEP_S, self._poll)

    def _poll(self) -> None:
        self._scheduled, self._timer = False, None
        waiting, self._waiting = self._waiting, []
        for mark, then in waiting:
            if self._try(mark, then):
                self._spins_until_s = time.monotonic() + SPIN_S
            else:
                self._waiting.append((mark, then))
        now_s = time.monotonic()
        if self._due:
            self._due = {owner: due for owner, due in self._due.items() if now_s < due.until_s}
        if not self._waiting and not self._due:
            return
        near = any(-SPIN_S < due.at_s - now_s < NEAR_S for due in self._due.values())
        if self._due and not near and now_s >= self._spins_until_s:
            time.sleep(PAUSE_S)
        self._schedule(soon=bool(self._due) or now_s < self._spins_until_s)

    @staticmethod
    def _try(mark: DeviceEvent, then: Then) -> bool:
        """Whether `mark` is reached, and `then` called."""
        error: Exception | None = None
        try:
            if not mark.query():
                return False
        except RuntimeError as failure:
            log.error("the device has failed: %s", failure)
            error = failure
        try:
            then(error)
        except Exception:
            log.exception("what follows a copy has failed")
        return True

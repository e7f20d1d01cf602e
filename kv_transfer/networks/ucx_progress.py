"""Drives one UCX worker from an asyncio loop, and turns its requests into futures.

ucxx's own asyncio layer polls: a receive that waits for its payload keeps a core busy. Here the worker's event
descriptor wakes the loop, so that waiting costs nothing. On top of that, `spin` polls for a short while after each
sign of activity: GPU transfers, and the control frames that go with them, are too quick for a wake-up each.

Life cycle: made with its worker → `track` requests → `stop`, after which it holds on to the worker only until every
request has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from kv_transfer.networks.ucx_api import Request, UcxWorker
from pdserve.errors import TransferError

SPIN_S = 0.005
"""How long to poll after the last activity before going back to sleep, while requests are open."""

BUSY_SPIN_S = 0.0003
"""How much of that without a pause. Each turn takes the interpreter lock, which the engine's thread wants as well."""

PAUSE_S = 0.00005
"""Between two looks after that."""

IDLE_SPIN_S = 0.0003
"""The same without open requests: the peer's answer to the last one should be here soon."""

LINGER_S = 10.0
"""How long to wait for what UCX does not let go of when its endpoint is closed."""

SAFETY_INTERVAL_S = 0.05
"""With requests open, look at least this often: not every transport raises every event."""


_kept: list[Progress] = []
"""Those whose requests never ended: the memory that they may still use is never freed."""


class _Open(NamedTuple):
    request: Request
    future: asyncio.Future[Any]
    result: int | None
    buffer: object  # UCX holds the bare address; this keeps the memory alive


class Progress:
    """Progress of `worker` in the running loop."""

    def __init__(self, worker: UcxWorker, error_class: type[Exception], spin: bool) -> None:
        self._worker: UcxWorker | None = worker
        self._error_class = error_class
        self._spin = spin
        self._open: list[_Open] = []
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._scheduled = False
        self._active_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._descriptor = worker.descriptor
        self._loop.add_reader(self._descriptor, self._run)
        self._schedule()

    def track(self, request: Request, result: int | None, buffer: object) -> asyncio.Future[Any]:
        """A future that holds `result` once `request` has completed, or fails with "peer_lost"."""
        future: asyncio.Future[Any] = self._loop.create_future()
        opened = _Open(request, future, result, buffer)
        if request.completed:
            self._finish(opened)
        else:
            self._open.append(opened)
        self._active_at_s = time.monotonic()
        self._schedule()
        return future

    def wake(self) -> None:
        """The peer has said something, and more may follow at once: spin, if that is what this one does."""
        if self._spin:
            self._active_at_s = time.monotonic()
            self._schedule()

    @property
    def busy(self) -> bool:
        return bool(self._open)

    def stop(self, on_kept: Callable[[int], None]) -> None:
        """Leave the loop, once the endpoint was closed by force, which cancels all its requests.

        One that UCX does not let go of at once is waited for: its buffer is not free. After `LINGER_S` it never will
        be, and `on_kept` is told how many there are.
        """
        self._advance()
        self._stopped = True
        self._loop.remove_reader(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()
        if self._open:
            self._linger(time.monotonic() + LINGER_S, on_kept)
        else:
            self._worker = None

    def _linger(self, until_s: float, on_kept: Callable[[int], None]) -> None:
        self._advance()
        if not self._open:
            self._worker = None
        elif time.monotonic() < until_s:
            self._loop.call_later(SAFETY_INTERVAL_S, self._linger, until_s, on_kept)
        else:
            _kept.append(self)
            on_kept(len(self._open))

    def _advance(self) -> None:
        assert self._worker is not None, "it goes last"
        self._worker.progress()
        self._sweep()

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._scheduled = False
        worker = self._worker
        if self._stopped or worker is None:
            return
        while True:
            worker.progress()
            if self._sweep():
                self._active_at_s = time.monotonic()
            quiet_s = time.monotonic() - self._active_at_s
            if self._spin and quiet_s < (SPIN_S if self._open else IDLE_SPIN_S):
                if quiet_s > BUSY_SPIN_S:
                    time.sleep(PAUSE_S)
                self._schedule()
                return
            if worker.arm():
                break
        if self._open and self._timer is None:
            self._timer = self._loop.call_later(SAFETY_INTERVAL_S, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self._run()

    def _sweep(self) -> bool:
        done = [item for item in self._open if item.request.completed]
        if not done:
            return False
        self._open = [item for item in self._open if not item.request.completed]
        for item in done:
            self._finish(item)
        return True

    def _finish(self, item: _Open) -> None:
        if item.future.done():
            return
        try:
            item.request.check_error()
        except self._error_class as error:
            item.future.set_exception(TransferError(f"the payload was lost: {error}", "peer_lost"))
        else:
            item.future.set_result(item.result)

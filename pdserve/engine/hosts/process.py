"""An engine in a process of its own: messages in, steps, messages out.

`roles.main` runs it. Owns the two ZMQ pipes to the server, the loop between them, and the end of the process. The
caller's `start` builds the engine and what belongs to it (model, transceiver). Life: it sends `EngineReady` when warm,
then `OutputFrame`s and `EngineStats`, and last, if it ends by an error, `EngineFailed`. It ends on `Shutdown`, on
SIGTERM, and with its parent; open requests are then finished as `Draining`, so that another worker may take them.

All work is done in one thread; a second one sends a heartbeat. While there is work, the loop takes the messages that
are there and does not wait. Without work it sleeps until a message comes, the transceiver posts an event (through a
socket pair), a deadline passes, or it is time to look whether the parent lives. Sending never blocks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import zmq

from pdserve.engine.hosts.idle_check import IdleCheck
from pdserve.engine.run.heartbeat import HangDetector, beating
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import ConfigError, Draining, EngineError, HostError, MalformedMessage, PdserveError
from pdserve.process import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, die_with_parent
from pdserve.protocol import (
    AbortRequest,
    EngineAlive,
    EngineFailed,
    EngineReady,
    EngineStats,
    GenerateRequest,
    OutputFrame,
    decode,
    encode,
    to_engine_decoder,
)

log = logging.getLogger(__name__)

_IDLE_TICK_S = 1.0
_STATS_INTERVAL_S = 0.1
# How long last words may take to leave; the server may be gone.
_LINGER_MS = 2000


def _unchanged(stats: EngineStats) -> EngineStats:
    return stats


def _yes() -> bool:
    return True


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class EngineService:
    """What `start` has built.

    Attributes:
        engine: ready to take requests.
        ready: the first message to the server.
        complete_stats: adds the transceiver's part to the engine's stats.
        are_ranks_alive: called at each heartbeat, in another thread. While it is False, no heartbeat is sent.
        close: ends whatever `start` has begun.
    """

    engine: Engine
    ready: EngineReady
    complete_stats: Callable[[EngineStats], EngineStats] = _unchanged
    are_ranks_alive: Callable[[], bool] = _yes
    close: Callable[[], None] = _nothing


def end_now(error: PdserveError, from_engine: str) -> NoReturn:
    """Tell the server `error` and end this process, from any thread, also while the main thread hangs in a device call.

    Nothing is closed: children end with the process.
    """
    log.error("the engine ends: %s", error)
    with zmq.Context() as context, context.socket(zmq.PUSH) as outbox:
        outbox.linger = _LINGER_MS
        outbox.connect(from_engine)
        outbox.send(encode(EngineFailed(error.to_info())))
    logging.shutdown()  # which lets them be written
    os._exit(EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED)


class EngineProcess:
    """The engine process's main loop.

    Args:
        start: builds the engine and warms it up. It is given the `wake` that the engine needs.
        to_engine: where to listen to the server.
        from_engine: where the server listens.
        hang_timeout_s: a step that takes longer ends the process; None, no step does.
    """

    def __init__(
        self,
        start: Callable[[Callable[[], None]], EngineService],
        to_engine: str,
        from_engine: str,
        hang_timeout_s: float | None = None,
    ) -> None:
        self._start = start
        self._hangs = HangDetector(hang_timeout_s)
        self._addresses = (to_engine, from_engine)
        self._parent_pid = os.getppid()
        self._stopping = False
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._stats = EngineStats()
        self._stats_owed, self._stats_sent_s = True, -math.inf

    def run(self) -> int:
        """Serve until told to end; returns the exit status."""
        # SIGKILL: an engine that hangs in a device call would not notice anything milder, and keep the device.
        die_with_parent(signal.SIGKILL)
        with zmq.Context() as context, _signals_call(self.stop):
            self._context = context
            self._inbox, self._outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
            for pipe in (self._inbox, self._outbox):
                pipe.set_hwm(0)
                pipe.linger = _LINGER_MS
            self._inbox.bind(self._addresses[0])
            self._outbox.connect(self._addresses[1])
            try:
                self._serve()
            except ConfigError as error:
                return self._fail(error, EXIT_CONFIG)
            except PdserveError as error:
                return self._fail(error, EXIT_FAILED)
            except OSError as error:
                return self._fail(HostError(f"the engine failed: {error}"), EXIT_FAILED)
            except Exception as error:
                log.exception("the engine ends")
                return self._fail(EngineError(f"the engine failed: {type(error).__name__}"), EXIT_FAILED)
            finally:
                self._inbox.close()
                self._outbox.close()
                self._woken.close()
                self._waker.close()
        return EXIT_OK

    def stop(self) -> None:
        """End after the current step; from any thread or signal handler."""
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """End the loop's sleep; from any thread."""
        # Full means that a wake-up is pending; closed, that the process is ending.
        with contextlib.suppress(BlockingIOError, OSError):
            self._waker.send(b"\0")

    def _serve(self) -> None:
        service = self._start(self.wake)
        try:
            self._send(service.ready)
            with self._context.socket(zmq.PUSH) as heart:
                heart.set_hwm(1)  # a server that is frozen itself needs to hear it once
                heart.linger = 0
                heart.connect(self._addresses[1])
                with beating(lambda: self._beat(heart, service)):
                    self._loop(service)
        finally:
            service.close()

    def _loop(self, service: EngineService) -> None:
        engine, check = service.engine, IdleCheck(service.engine)
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._woken, zmq.POLLIN)
        while not self._stopping:
            self._receive(engine, poller, 0.0)
            if engine.has_work:
                check.note_work()
                self._stats_owed = True
                with self._hangs:
                    frame = engine.step()
                self._send_frame(frame)
                if engine.failure is not None:
                    raise engine.failure
                self._report(service)
            elif not self._stopping:
                self._report(service)
                self._sleep(engine, poller, check.run_slice())
        self._send_frame(engine.fail_all(Draining("the worker is shutting down")))

    def _sleep(self, engine: Engine, poller: zmq.Poller, to_check_s: float | None) -> None:
        """Wait for something to do, but no longer than until the books are to be checked. After a whole tick without,
        look at the transceiver and the parent."""
        timeouts_s = [_IDLE_TICK_S] if to_check_s is None else [_IDLE_TICK_S, to_check_s]
        if self._stats_owed:
            timeouts_s.append(self._stats_sent_s + _STATS_INTERVAL_S - time.monotonic())
        to_deadline_s = engine.seconds_to_deadline()
        if to_deadline_s is not None:
            timeouts_s.append(to_deadline_s)
        timeout_s = max(0.0, min(timeouts_s))
        if self._receive(engine, poller, timeout_s) or timeout_s < _IDLE_TICK_S:
            return
        self._stats_owed = True
        if os.getppid() != self._parent_pid:
            log.error("parent process %d is gone", self._parent_pid)
            self._stopping = True

    def _receive(self, engine: Engine, poller: zmq.Poller, timeout_s: float) -> bool:
        """Take in every message that is there, waiting at most `timeout_s` for the first; whether anything came."""
        ready = dict(poller.poll(math.ceil(timeout_s * 1000)))
        if self._woken.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._woken.recv(4096)
        if self._inbox in ready:
            with contextlib.suppress(zmq.Again):
                while True:
                    self._take(engine, self._inbox.recv(zmq.NOBLOCK))
        return bool(ready)

    def _take(self, engine: Engine, frame: bytes) -> None:
        try:
            message = decode(to_engine_decoder, frame)
        except MalformedMessage as error:
            log.error("the server said nothing that makes sense: %s", error)
            return
        if isinstance(message, GenerateRequest):
            engine.submit(message)
        elif isinstance(message, AbortRequest):
            engine.abort(message.key)
        else:
            self._stopping = True

    def _report(self, service: EngineService) -> None:
        """Send the stats if they have changed and the last ones are old enough; else they stay owed."""
        now_s = time.monotonic()
        if not self._stats_owed or now_s - self._stats_sent_s < _STATS_INTERVAL_S:
            return
        stats = service.complete_stats(service.engine.stats())
        self._stats_owed, self._stats_sent_s = False, now_s
        if stats != self._stats:
            self._stats = stats
            self._send(stats)

    def _send_frame(self, frame: OutputFrame) -> None:
        if frame.deltas or frame.finished:
            self._send(frame)

    def _send(self, message: OutputFrame | EngineStats | EngineReady | EngineFailed) -> None:
        """Queue `message`. Without a high-water mark this never blocks and never drops, however slow the server."""
        self._outbox.send(encode(message), zmq.NOBLOCK)

    def _beat(self, heart: zmq.Socket[bytes], service: EngineService) -> None:
        """Twice a second, in another thread."""
        if self._hangs.beat():
            faulthandler.dump_traceback()
            error = EngineError(f"a step has not ended within {self._hangs.timeout_s:g} s: its device may hang")
            end_now(error, self._addresses[1])
        if service.are_ranks_alive():
            with contextlib.suppress(zmq.Again):
                heart.send(encode(EngineAlive()), zmq.NOBLOCK)

    def _fail(self, error: PdserveError, status: int) -> int:
        log.error("the engine ends: %s", error)
        self._send(EngineFailed(error.to_info()))
        return status


@contextlib.contextmanager
def _signals_call(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM calls `stop`; SIGINT is left to the server, which gets it too. Only a main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before_term = signal.signal(signal.SIGTERM, lambda *_: stop())
    before_int = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before_term)
        signal.signal(signal.SIGINT, before_int)

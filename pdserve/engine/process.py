"""The main loop of an engine's process: messages in, steps, frames out.

Owns the two ZMQ pipes to the server process, and the rule when to sleep: only when no step would do anything, woken by
a message, by the mover's events, by the next deadline or, at the latest, by the next look at the parent process. One
thread runs everything; sends never block, because the server reads without bound.

Life cycle: `run` builds the engine, says `EngineReady`, loops until `Shutdown`, SIGTERM, the parent's end or a failure,
and finishes what is open. A failure is said as `EngineFailed`, last.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import zmq

from pdserve.engine.engine import Engine
from pdserve.errors import Aborted, ConfigError, EngineError, PdserveError
from pdserve.protocol import (
    AbortRequest,
    EngineFailed,
    EngineReady,
    EngineStats,
    GenerateRequest,
    OutputFrame,
    encode,
    to_engine_decoder,
)

log = logging.getLogger(__name__)

EXIT_OK, EXIT_FAILED, EXIT_CONFIG = 0, 1, 2
_STATS_INTERVAL_S = 0.1
_IDLE_TICK_S = 1.0
_LINGER_MS = 2000


def _no_transfers(stats: EngineStats) -> EngineStats:
    return stats


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Host:
    """What a role gives the loop: the engine, its greeting, and what surrounds it.

    `complete` adds the transceiver's counters to the engine's; `close` ends the transceiver.
    """

    engine: Engine
    ready: EngineReady
    complete: Callable[[EngineStats], EngineStats] = _no_transfers
    close: Callable[[], None] = _nothing


class EngineProcess:
    """The loop, between the pipes `to_engine` and `from_engine` (ZMQ addresses that the server has bound)."""

    def __init__(self, to_engine: str, from_engine: str) -> None:
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for pipe, address in ((self._inbox, to_engine), (self._outbox, from_engine)):
            pipe.set_hwm(0)
            pipe.linger = _LINGER_MS
            pipe.connect(address)
        self._awake, self._alarm = socket.socketpair()
        self._awake.setblocking(False)
        self._alarm.setblocking(False)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._awake, zmq.POLLIN)
        self._parent = os.getppid()
        self._stopping = False
        self._stats = EngineStats()
        self._stats_due_s = 0.0

    def wake(self) -> None:
        """End the loop's sleep; from any thread or signal handler."""
        # A full buffer means that the loop has not read the earlier ones, so it is awake.
        with contextlib.suppress(BlockingIOError):
            self._alarm.send(b"!")

    def run(self, build: Callable[[Callable[[], None]], Host]) -> int:
        """Serve until told to stop; returns the exit status.

        Args:
            build: makes the engine and its surroundings; gets `wake` for the mover's events.
        """
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        host: Host | None = None
        try:
            host = build(self.wake)
            self._send(host.ready)
            self._loop(host)
        except PdserveError as error:
            self._fail(error)
            return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_FAILED
        except Exception as error:
            log.exception("the engine process failed")
            self._fail(EngineError(f"{type(error).__name__}: {error}"))
            return EXIT_FAILED
        finally:
            if host is not None:
                host.close()
            self._close()
        return EXIT_OK

    def _loop(self, host: Host) -> None:
        engine = host.engine
        while not self._stopping:
            self._receive(engine)
            if engine.has_work:
                self._say(engine.step())
                if engine.failure is not None:
                    raise engine.failure
            else:
                self._sleep(host)
            self._say_stats(host, idle=not engine.has_work)
        self._say(engine.fail_all(Aborted("the worker is shutting down")))

    def _receive(self, engine: Engine) -> None:
        while True:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = to_engine_decoder.decode(frame)
            if isinstance(message, GenerateRequest):
                engine.submit(message)
            elif isinstance(message, AbortRequest):
                engine.abort(message.key)
            else:
                self._stopping = True

    def _sleep(self, host: Host) -> None:
        if host.engine.is_idle:
            host.engine.check()
        if os.getppid() != self._parent:
            log.error("the server process is gone")
            self._stopping = True
            return
        deadline_s = host.engine.seconds_to_deadline()
        timeout_s = _IDLE_TICK_S if deadline_s is None else min(_IDLE_TICK_S, deadline_s)
        for ready, _ in self._poller.poll(math.ceil(timeout_s * 1e3)):
            if ready != self._inbox:
                self._drain_alarm()

    def _drain_alarm(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass

    def _say(self, frame: OutputFrame) -> None:
        if frame.deltas or frame.finished:
            self._send(frame)

    def _say_stats(self, host: Host, *, idle: bool) -> None:
        now_s = time.monotonic()
        if now_s < self._stats_due_s and not idle:
            return
        stats = host.complete(host.engine.stats())
        if stats != self._stats:
            self._stats = stats
            self._stats_due_s = now_s + _STATS_INTERVAL_S
            self._send(stats)

    def _send(self, message: msgspec.Struct) -> None:
        self._outbox.send(encode(message), zmq.NOBLOCK)

    def _fail(self, error: PdserveError) -> None:
        self._send(EngineFailed(error.to_info()))

    def _on_sigterm(self, *_: object) -> None:
        self._stopping = True
        self.wake()

    def _close(self) -> None:
        self._inbox.close(linger=0)
        self._outbox.close()
        self._context.term()
        self._awake.close()
        self._alarm.close()

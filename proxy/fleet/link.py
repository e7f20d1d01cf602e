"""One worker's socket.

Owns the WebSocket, reconnecting with back-off, and the table of attempts in flight there; keeps the worker's `Load` for
as long as a connection lasts. Does not own the decision who is a worker (`Membership`) or what an attempt means
(`Attempt`).

Life cycle: `run` connects and reads until the worker is both disconnected and unconfirmed, i.e. no longer in the
manager's view. A live socket keeps serving whatever the manager says; a dead one ends every attempt on it at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import aiohttp

from pdserve.cluster_api import WorkerInfo, WorkerRecord
from pdserve.errors import MalformedMessage, WorkerLost
from pdserve.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    Finished,
    FromWorker,
    GenerateRequest,
    Hello,
    Key,
    LoadReport,
    OutputFrame,
    TokenDelta,
    decode,
    encode,
    from_worker_decoder,
    unknown_kind,
)
from proxy.fleet.load import Load

log = logging.getLogger(__name__)

_HEARTBEAT_S = 4.0
_CONNECT_TIMEOUT_S = 3.0
_CLOSE_TIMEOUT = aiohttp.ClientWSTimeout(ws_close=0.5)
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Listener(Protocol):
    """Is told what a worker says about one attempt. Called in the task that reads the socket; must not block or
    raise."""

    def on_delta(self, link: WorkerLink, delta: TokenDelta, received_at: float) -> None: ...
    def on_finished(self, link: WorkerLink, finished: Finished) -> None: ...
    def on_lost(self, link: WorkerLink) -> None: ...


class WorkerLink:
    """A worker and the socket to it.

    Args:
        record: the worker as the manager has it.
        session: makes the connections.
        sender: this proxy's name, for its Hello.
        on_change: called when the worker may have become placeable, or no longer is.
    """

    def __init__(
        self, record: WorkerRecord, session: aiohttp.ClientSession, sender: str, on_change: Callable[[], None]
    ) -> None:
        self.info: WorkerInfo = record.info
        self.confirmed = True
        self.connected = False
        self.load = Load(record.info.role)
        self._record_state = record.state
        self._session = session
        self._sender = sender
        self._on_change = on_change
        self._listeners: dict[Key, Listener] = {}
        self._peer_incarnation = ""
        self._outbox: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._nudge = asyncio.Event()

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    @property
    def placeable(self) -> bool:
        """Whether new requests may go there."""
        return self.connected and self._record_state == "ready" and self.load.takes_requests

    def submit(self, request: GenerateRequest, listener: Listener) -> None:
        """Send `request`. `listener` is told all that the worker says about it, until it has finished or is aborted."""
        assert self.connected, f"{self.worker_id} is not connected"
        self._listeners[request.key] = listener
        self.load.begin(request)
        self._send(encode(request))

    def abort(self, key: Key) -> None:
        """Withdraw an attempt; nothing more is heard of it. Does nothing if it has ended."""
        if self._listeners.pop(key, None) is not None:
            self.load.end(key)
            self._send(encode(AbortRequest(key)))

    def update(self, record: WorkerRecord) -> bool:
        """Take over what the manager says now. False if `record` is another process, which needs its own link."""
        same_process = record.info.kv == self.info.kv and record.info.started_at == self.info.started_at
        greeted = self.connected and self._peer_incarnation == record.info.incarnation
        if record.info.url != self.info.url or not (same_process or greeted):
            return False
        self.info = record.info
        self.confirmed = True
        self._record_state = record.state
        self._nudge.set()
        self._on_change()
        return True

    def retire(self) -> None:
        """Another process took this worker's name: place nothing here, and end with the socket."""
        self.confirmed = False
        self._record_state = "draining"
        self._nudge.set()

    def unconfirm(self) -> None:
        """The manager does not know this worker (any more); it stays for as long as its socket lives."""
        self.confirmed = False
        self._nudge.set()

    async def run(self) -> None:
        """Keep the socket open; returns when the worker is gone for good."""
        failures = 0
        while self.confirmed:
            try:
                async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                    socket = await self._connect()
            except (aiohttp.ClientError, OSError, TimeoutError, WorkerLost, MalformedMessage) as error:
                log.log(logging.INFO if failures == 0 else logging.DEBUG, "no socket to %s: %r", self.worker_id, error)
            else:
                connected_at = time.monotonic()
                await self._serve(socket)
                # A worker that greets and hangs up is no better than one that does not answer.
                if time.monotonic() - connected_at > _BACKOFF_S[-1]:
                    failures = 0
            if self.confirmed:
                await self._pause(failures)
                failures += 1
        log.info("worker %s is gone", self.worker_id)

    async def _connect(self) -> aiohttp.ClientWebSocketResponse:
        socket = await self._session.ws_connect(
            f"{self.info.url}/v1/stream", heartbeat=_HEARTBEAT_S, max_msg_size=0, timeout=_CLOSE_TIMEOUT
        )
        try:
            await socket.send_bytes(encode(Hello(version=PROTOCOL_VERSION, sender=self._sender)))
            hello = decode(from_worker_decoder, await _receive_bytes(socket))
            if not isinstance(hello, Hello) or hello.version != PROTOCOL_VERSION:
                raise WorkerLost(f"{self.worker_id} speaks another protocol: {hello!r:.100}")
            if hello.sender != self.worker_id:
                raise WorkerLost(f"{self.info.url} is {hello.sender}, not {self.worker_id}")
        except BaseException:
            await socket.close()
            raise
        self._peer_incarnation = hello.incarnation
        return socket

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.connected = True
        log.info("connected to %s at %s", self.worker_id, self.info.url)
        writer = asyncio.create_task(self._write(socket))
        self._on_change()
        try:
            await self._read(socket)
        except (aiohttp.ClientError, OSError, MalformedMessage) as error:
            log.warning("the socket to %s failed: %s", self.worker_id, error)
        finally:
            writer.cancel()
            self._lose()
            await socket.close()
            await asyncio.gather(writer, return_exceptions=True)

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while (frame := await socket.receive()).type is aiohttp.WSMsgType.BINARY:
            message = _decode(frame.data)
            if isinstance(message, OutputFrame):
                self._deliver(message)
            elif isinstance(message, LoadReport):
                self._take_report(message)
        log.log(logging.WARNING if self._listeners else logging.INFO, "%s closed its socket", self.worker_id)

    def _deliver(self, frame: OutputFrame) -> None:
        received_at = time.perf_counter()
        load = self.load
        for delta in frame.deltas:
            listener = self._listeners.get(delta.key)
            if listener is not None:
                if load.prefilling:
                    load.prefilled(delta.key)
                listener.on_delta(self, delta, received_at)
        for finished in frame.finished:
            listener = self._listeners.pop(finished.key, None)
            if listener is not None:
                load.end(finished.key)
                listener.on_finished(self, finished)

    def _take_report(self, report: LoadReport) -> None:
        was_placeable = self.placeable
        self.load.take(report)
        if self.placeable != was_placeable:
            self._on_change()

    def _lose(self) -> None:
        self.connected = False
        self.load = Load(self.info.role)
        self._outbox.clear()
        listeners, self._listeners = self._listeners, {}
        self._on_change()
        for listener in listeners.values():
            listener.on_lost(self)

    def _send(self, frame: bytes) -> None:
        if self.connected:
            self._outbox.append(frame)
            self._filled.set()

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        try:
            while True:
                await self._filled.wait()
                self._filled.clear()
                while self._outbox:
                    await socket.send_bytes(self._outbox.popleft())
        except (aiohttp.ClientError, OSError):
            await socket.close()

    async def _pause(self, failures: int) -> None:
        """Wait before the next try; news from the manager end the wait."""
        self._nudge.clear()
        pause_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)] * random.uniform(0.75, 1.25)
        try:
            async with asyncio.timeout(pause_s):
                await self._nudge.wait()
        except TimeoutError:
            return


def _decode(frame: bytes) -> FromWorker | None:
    """What a worker says; None if only a later release knows what it is. Raises `MalformedMessage`."""
    try:
        return decode(from_worker_decoder, frame)
    except MalformedMessage:
        kind = unknown_kind(frame)
        if kind is None:
            raise
        log.debug("a message of the unknown kind %s is left out", kind)
        return None


async def _receive_bytes(socket: aiohttp.ClientWebSocketResponse) -> bytes:
    frame = await socket.receive()
    if frame.type is not aiohttp.WSMsgType.BINARY:
        raise WorkerLost(f"the worker closed the socket: {frame.extra or frame.data}")
    return bytes(frame.data)

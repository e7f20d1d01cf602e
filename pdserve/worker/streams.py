"""The proxies' sockets of a worker: who submitted what, and what goes back to whom.

A request belongs to the socket that submitted it; when the socket ends, its requests are aborted. Each socket has
an outbox of its own, so a slow proxy delays nobody else; one that falls `OUTBOX_FRAMES` behind is disconnected.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable

from aiohttp import WSMsgType, web

from pdserve.errors import MalformedMessage, PdserveError
from pdserve.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    Finished,
    GenerateRequest,
    Hello,
    Key,
    LoadReport,
    OutputFrame,
    TokenDelta,
    decode,
    encode,
    to_worker_decoder,
    unknown_kind,
)

log = logging.getLogger(__name__)

OUTBOX_FRAMES = 65536
_HEARTBEAT_S = 5.0
_MAX_FRAME_BYTES = 64 << 20


class ProxyStream:
    """One proxy's socket, from its Hello until it closes."""

    def __init__(self, socket: web.WebSocketResponse, peer: str) -> None:
        self.peer = peer
        self.keys: set[Key] = set()
        self._socket = socket
        self._outbox: deque[bytes] = deque()
        self._filled = asyncio.Event()
        self._writer = asyncio.create_task(self._write())

    def send(self, frame: bytes) -> None:
        if len(self._outbox) >= OUTBOX_FRAMES:
            log.error("proxy %s does not read its socket; disconnecting it", self.peer)
            self._writer.cancel()
            return
        self._outbox.append(frame)
        self._filled.set()

    async def _write(self) -> None:
        try:
            while not self._socket.closed:
                await self._filled.wait()
                self._filled.clear()
                while self._outbox:
                    await self._socket.send_bytes(self._outbox.popleft())
        except ConnectionError:
            log.info("proxy %s is gone", self.peer)
        finally:
            await self._socket.close()

    async def close(self) -> None:
        self._writer.cancel()
        await asyncio.gather(self._writer, return_exceptions=True)


class Streams:
    """All sockets of one worker.

    Args:
        identity: this worker's id and incarnation, for its Hello.
        admit: raises the reason (`Draining`, ...) why no request may be submitted now.
        forward: hands a message to the engine.
        first_report: the load report a new socket starts with.
    """

    def __init__(
        self,
        identity: Callable[[], tuple[str, str]],
        admit: Callable[[], None],
        forward: Callable[[GenerateRequest | AbortRequest], None],
        first_report: Callable[[], LoadReport],
    ) -> None:
        self._identity = identity
        self._admit = admit
        self._forward = forward
        self._first_report = first_report
        self._streams: set[ProxyStream] = set()
        self._owner: dict[Key, ProxyStream] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Return when no request is open."""
        await self._idle.wait()

    @property
    def open_requests(self) -> int:
        return len(self._owner)

    @property
    def open_sockets(self) -> int:
        return len(self._streams)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """`GET /v1/stream`: serve one socket until it ends."""
        socket = web.WebSocketResponse(heartbeat=_HEARTBEAT_S, max_msg_size=_MAX_FRAME_BYTES, compress=False)
        await socket.prepare(request)
        worker_id, incarnation = self._identity()
        stream = ProxyStream(socket, request.remote or "?")
        stream.send(encode(Hello(version=PROTOCOL_VERSION, sender=worker_id, incarnation=incarnation)))
        stream.send(encode(self._first_report()))
        self._streams.add(stream)
        try:
            await self._read(stream, socket)
        finally:
            self._streams.discard(stream)
            for key in stream.keys:
                self._owner.pop(key, None)
                self._forward(AbortRequest(key))
            self._note_idle()
            await stream.close()
        return socket

    async def _read(self, stream: ProxyStream, socket: web.WebSocketResponse) -> None:
        async for frame in socket:
            if frame.type is not WSMsgType.BINARY:
                await socket.close(code=1003, message=b"binary frames only")
                return
            try:
                message = decode(to_worker_decoder, frame.data)
            except MalformedMessage as error:
                if unknown_kind(frame.data) is not None:  # a later release's proxy
                    continue
                log.error("hanging up on proxy %s: %s", stream.peer, error)
                await socket.close(code=1007, message=b"not a message")
                return
            if isinstance(message, Hello):
                if message.version != PROTOCOL_VERSION:
                    reason = f"protocol version {message.version}, expected {PROTOCOL_VERSION}"
                    await socket.close(code=1002, message=reason.encode())
                    return
                stream.peer = message.sender
            elif isinstance(message, AbortRequest):
                self._forward(message)
            else:
                self._submit(stream, message)

    def _submit(self, stream: ProxyStream, request: GenerateRequest) -> None:
        try:
            self._admit()
        except PdserveError as error:
            stream.send(encode(OutputFrame([], [Finished(request.key, "error", error=error.to_info())])))
            return
        stream.keys.add(request.key)
        self._owner[request.key] = stream
        self._idle.clear()
        self._forward(request)

    def deliver(self, frame: OutputFrame) -> None:
        """Send each proxy the deltas and ends of its own requests. Those of requests without a socket are dropped."""
        parts: dict[ProxyStream, tuple[list[TokenDelta], list[Finished]]] = {}
        for delta in frame.deltas:
            stream = self._owner.get(delta.key)
            if stream is not None:
                parts.setdefault(stream, ([], []))[0].append(delta)
        for finished in frame.finished:
            stream = self._owner.pop(finished.key, None)
            if stream is not None:
                stream.keys.discard(finished.key)
                parts.setdefault(stream, ([], []))[1].append(finished)
        for stream, (deltas, ends) in parts.items():
            stream.send(encode(OutputFrame(deltas, ends)))
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._owner:
            self._idle.set()

    def broadcast(self, report: LoadReport) -> None:
        frame = encode(report)
        for stream in self._streams:
            stream.send(frame)

    def fail_all(self, error: PdserveError) -> None:
        """Finish every open request with `error`: the engine is gone."""
        self.deliver(OutputFrame([], [Finished(key, "error", error=error.to_info()) for key in self._owner]))

    async def close(self) -> None:
        """Let queued frames go out, then close the sockets."""
        await asyncio.sleep(0.05)
        await asyncio.gather(*(stream.close() for stream in self._streams), return_exceptions=True)

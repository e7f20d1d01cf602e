"""Connections of an HTTP server: how many there may be, how long they may be silent, and what is no HTTP at all.

Owns what aiohttp leaves open. A connection is cut when it has sent no whole request head `head_timeout_s` after it was
opened, or after the first byte of the head; when it has been idle for `idle_timeout_s` after an answer; and when it
does not read: while more lies unsent than the transport's high-water mark, or the connection is being closed, it must
take `MIN_READ_BYTES_PER_S`. Above `max_connections` a new one is answered 503 and closed, so that the descriptors that
a server needs for its own sockets are always there. Malformed HTTP is a 400 and, now and then, one line in the log.

One sweep looks at all connections every few seconds, so a request pays for none of this.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from pdserve.errors import NotReady, PdserveError, RequestError
from pdserve.log_rate import OccasionalLog
from pdserve.process import allow_all_descriptors

log = logging.getLogger(__name__)

MIN_READ_BYTES_PER_S = 1024
_RESERVED_DESCRIPTORS = 256
"""Kept for sockets to other processes, files and pipes; an eighth of the limit if that is more."""
_MOST_CONNECTIONS = 65_536
_CLIENT_MISTAKES = (HttpProcessingError, web.RequestPayloadError)

_malformed = OccasionalLog(log, logging.INFO)
_refused = OccasionalLog(log, logging.WARNING)
_silent = OccasionalLog(log, logging.INFO)
_stalled = OccasionalLog(log, logging.INFO)


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """See the module. `max_connections` None follows from the limit of open files."""

    head_timeout_s: float = 15.0
    idle_timeout_s: float = 75.0
    stall_timeout_s: float = 15.0
    max_connections: int | None = None


class Connection(web.RequestHandler):
    """One connection. `_waiter` is aiohttp's: pending while the next request's head is waited for."""

    __slots__ = ("_head_number", "_head_since", "_owner", "_refused", "_unsent", "_unsent_since", "_wire")

    def __init__(self, owner: Connections, server: web.Server, **settings: Any) -> None:
        super().__init__(server, **settings)
        self._owner = owner
        self._head_number = 0
        self._head_since = 0.0
        self._unsent = 0
        self._unsent_since = 0.0
        self._wire: asyncio.Transport | None = None
        self._refused = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        wire = cast(asyncio.Transport, transport)
        if self._owner.is_full:
            self._refused = True
            _refused.log("%d connections are open, as many as may be; a new one was refused", self._owner.max_open)
            wire.write(_plain_answer(NotReady("too many connections are open")))
            wire.close()
            return
        self._wire = wire
        self._head_since = self._loop.time()
        self._owner.open.add(self)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._owner.open.discard(self)
        if not self._refused:
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        waiter = self._waiter
        if data and waiter is not None and self._head_number != self._request_count and not waiter.done():
            self._head_number = self._request_count
            self._head_since = self._loop.time()

    def check(self, now: float, limits: ConnectionLimits) -> None:
        """Cut this connection if its time is up."""
        assert self._wire is not None
        waits_for_head = self._waiter is not None and not self._waiter.done()
        if waits_for_head and self._head_number == self._request_count:
            if now - self._head_since >= limits.head_timeout_s:
                _silent.log("a connection from %s sent no request in time and is cut", self.peername)
                self._wire.abort()
        elif not self._reads(now, limits.stall_timeout_s):
            _stalled.log("a connection from %s does not read its answer and is cut", self.peername)
            self._wire.abort()

    def forgive(self, late_s: float) -> None:
        """This process did nothing for `late_s`; that is not the client's fault."""
        self._head_since += late_s
        self._unsent_since += late_s

    def _reads(self, now: float, stall_timeout_s: float) -> bool:
        assert self._wire is not None
        unsent = self._wire.get_write_buffer_size() if self._paused or self._wire.is_closing() else 0
        if unsent == 0 or self._unsent == 0 or unsent <= self._unsent - MIN_READ_BYTES_PER_S * stall_timeout_s:
            self._unsent, self._unsent_since = unsent, now
        return now - self._unsent_since < stall_timeout_s or unsent == 0

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer where no handler is at work: malformed HTTP, or a fault of ours outside all of them."""
        if not isinstance(exc, _CLIENT_MISTAKES):
            return super().handle_error(request, status, exc, message)
        _malformed.log("malformed HTTP from %s: %r", request.remote, _first_line(exc))
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun")
        error = RequestError(f"malformed HTTP: {_first_line(exc)}")
        answer = web.Response(status=error.status, body=_body(error), content_type="application/json")
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **settings: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, _CLIENT_MISTAKES):
            _malformed.log("malformed HTTP from %s: %r", self.peername, _first_line(error))
        else:
            super().log_exception(*args, **settings)


class Connections:
    """All connections of one server: the protocol factory that its listening socket needs.

    Life cycle: `sweep` runs as a task for as long as the server does.
    """

    def __init__(self, server: web.Server, limits: ConnectionLimits) -> None:
        self.open: set[Connection] = set()
        self.max_open = limits.max_connections or affordable_connections()
        self._server = server
        self._limits = limits
        self._loop = asyncio.get_running_loop()

    @property
    def is_full(self) -> bool:
        return len(self.open) >= self.max_open

    def __call__(self) -> Connection:
        return Connection(
            self,
            self._server,
            loop=self._loop,
            access_log=None,
            keepalive_timeout=self._limits.idle_timeout_s,
        )

    async def sweep(self) -> None:
        """Look at all connections again and again."""
        limits = self._limits
        interval_s = min(limits.head_timeout_s, limits.stall_timeout_s) / 6
        while True:
            due = self._loop.time() + interval_s
            await asyncio.sleep(interval_s)
            now = self._loop.time()
            for number, connection in enumerate(list(self.open)):
                if number % 1000 == 999:
                    await asyncio.sleep(0)
                if connection in self.open:
                    if now - due > interval_s:
                        connection.forgive(now - due)
                    connection.check(now, limits)


class ConnectionSite(web.SockSite):
    """A listening socket whose connections are `Connection`s."""

    def __init__(self, runner: web.AppRunner, listener: Any, limits: ConnectionLimits) -> None:
        super().__init__(runner, listener, backlog=1024)
        self._limits = limits
        self._sweep: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None
        connections = Connections(self._runner.server, self._limits)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(connections, sock=self._sock, backlog=self._backlog)
        self._sweep = asyncio.create_task(connections.sweep(), name="http-connections")

    async def stop(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        await super().stop()


def affordable_connections() -> int:
    """How many clients may be connected, with the limit of open files at its highest."""
    limit = allow_all_descriptors()
    if limit == resource.RLIM_INFINITY:
        return _MOST_CONNECTIONS
    return max(16, min(limit - max(_RESERVED_DESCRIPTORS, limit // 8), _MOST_CONNECTIONS))


def _first_line(error: BaseException) -> str:
    text = error.message if isinstance(error, HttpProcessingError) else str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0][:200]


def _body(error: PdserveError) -> bytes:
    return msgspec.json.encode(error.to_openai())


def _plain_answer(error: PdserveError) -> bytes:
    """`error` as the bytes of a whole HTTP answer."""
    body = _body(error)
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: {error.retry_after_s or 1}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body

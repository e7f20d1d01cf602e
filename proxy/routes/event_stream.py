"""A client's stream of server-sent events: the HTTP response under it, and whether the client keeps up.

Owns the response from its status line to its last byte, and a comment in it where nothing was sent for a while: what
stands between client and server cuts connections that are silent. A client keeps up as long as no more than the
transport's high-water mark lies unsent; then `send_now` costs no task, no coroutine and no timer.
"""

from __future__ import annotations

import asyncio

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_HIGH_WATER_BYTES = 64 * 1024
"""asyncio's own mark, from which `send` waits."""
SILENCE_S = 10.0
_KEEP_ALIVE = b": keep-alive\n\n"


class EventStream:
    """Life cycle: `start`, `send` or `end`, which start the response; then also `send_now`; `end` once, or `break_off`;
    `close` at last.

    `start`, `send` and `end` raise ConnectionError when the client is gone.
    """

    def __init__(self, request: web.Request) -> None:
        self._request = request
        self._response = web.StreamResponse(headers=_HEADERS)
        self._writer: AbstractStreamWriter | None = None
        self._transport: asyncio.Transport | None = None
        self._chunked = request.version >= HttpVersion11
        self._silent = True
        self._timer: asyncio.TimerHandle | None = None

    @property
    def response(self) -> web.StreamResponse:
        return self._response

    @property
    def started(self) -> bool:
        return self._writer is not None

    @property
    def keeps_up(self) -> bool:
        """Whether the response has started and `send_now` may be called."""
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        return transport.get_write_buffer_size() <= _HIGH_WATER_BYTES

    def send_now(self, events: bytes) -> None:
        """Send `events` without waiting; only while the client keeps up."""
        assert self._transport is not None
        self._silent = False
        # As aiohttp's writer frames it, which takes three coroutines for it.
        self._transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)

    async def start(self) -> None:
        """Send status line and headers."""
        await self._start()

    async def send(self, events: bytes) -> None:
        """Send `events`, and wait while too much lies unsent."""
        writer = await self._start()
        self._silent = False
        await writer.write(events)
        await writer.drain()

    async def end(self, events: bytes) -> None:
        """Send the last `events`."""
        await self._start()
        self.close()
        await self._response.write_eof(events)

    async def fail(self, event: bytes) -> None:
        """Send a last `event` of a response that has started, and close the connection after it."""
        self.close()
        self._response.force_close()
        await self._response.write_eof(event)

    def break_off(self) -> None:
        """Drop the connection with whatever lies unsent."""
        if self._request.transport is not None:
            self._request.transport.abort()

    def close(self) -> None:
        """No comments any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep_alive(self) -> None:
        """Every half of the time that may pass in silence: a comment if nothing was sent since the last time."""
        if self._silent and self.keeps_up:
            self.send_now(_KEEP_ALIVE)
        else:
            self._silent = True
        self._timer = asyncio.get_running_loop().call_later(SILENCE_S / 2, self._keep_alive)

    async def _start(self) -> AbstractStreamWriter:
        if self._writer is None:
            if self._chunked:
                self._response.enable_chunked_encoding()
            self._writer = await self._response.prepare(self._request)
            self._transport = self._request.transport
            self._silent = False
            self._timer = asyncio.get_running_loop().call_later(SILENCE_S / 2, self._keep_alive)
            assert self._writer is not None
        return self._writer

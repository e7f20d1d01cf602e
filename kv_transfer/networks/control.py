"""Control frames over a TCP connection or a Unix socket: a length and the bytes.

Both tell of a peer's death at once (the kernel closes its sockets), keep order, and cost one system call a frame.
Life cycle: connected → frames, the first of which is the peer's greeting → closed by us, or lost. Until the peer is
`trusted`, its frames may be no longer than a greeting.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

from kv_transfer.networks.greeting import MAX_GREETING_BYTES
from pdserve.addresses import is_loopback_address

HEADER_BYTES = 4
MAX_FRAME_BYTES = 1 << 20
MAX_UNSENT_BYTES = 8 << 20
"""More than this unsent means that the peer reads nothing; its link is given up rather than our memory."""

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
"""Notices within about ten seconds that a host vanished without closing its sockets."""


CLOSE_S = 2.0
"""How long a peer may take to read what was sent to it before we closed."""


class ControlStream(asyncio.Protocol):
    """One connection. `on_lost` is called at most once, and never after `close`; an ended one refers to nobody."""

    def __init__(self, on_frame: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self.trusted = False
        self._on_frame = on_frame
        self._on_lost = on_lost
        self._stream: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ended = False

    @property
    def peer(self) -> str:
        """The other end's address, for people."""
        if self._stream is None:
            return "nobody"
        address = self._stream.get_extra_info("peername")
        return str(address[0]) if isinstance(address, tuple) else "this host"

    @property
    def is_local(self) -> bool:
        """Whether it goes over a Unix socket, or over the loopback interface."""
        address = None if self._stream is None else self._stream.get_extra_info("sockname")
        if not isinstance(address, tuple):
            return self._stream is not None
        return is_loopback_address(str(address[0]))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._stream = cast(asyncio.Transport, transport)
        if self._ended:
            self._stream.abort()
            return
        sock: socket.socket = transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:
            _keep_alive(sock)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES and not self._ended:
            body = start + HEADER_BYTES
            end = body + int.from_bytes(self._buffer[start:body], "big")
            limit = MAX_FRAME_BYTES if self.trusted else MAX_GREETING_BYTES
            if end - body > limit:
                self._lose(f"a control frame of {end - body} bytes is over the limit of {limit}")
                return
            if len(self._buffer) < end:
                break
            frame = bytes(self._buffer[body:end])
            start = end
            self._on_frame(frame)
        del self._buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(f"the connection broke: {exc}" if exc else "the peer closed the connection")

    def send(self, frame: bytes) -> None:
        """Queue `frame`; a stream that has ended swallows it."""
        if self._ended or self._stream is None:
            return
        self._stream.write(len(frame).to_bytes(HEADER_BYTES, "big") + frame)
        if self._stream.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self._lose(f"the peer has left {MAX_UNSENT_BYTES} bytes of control messages unread")

    def close(self) -> None:
        """Send what is queued and close; a peer that does not read gets no more than `CLOSE_S` to do so."""
        self._end()
        stream = self._stream
        if stream is not None:
            stream.close()
            if stream.get_write_buffer_size():
                asyncio.get_running_loop().call_later(CLOSE_S, stream.abort)

    def _lose(self, cause: str) -> None:
        if self._ended:
            return
        on_lost = self._on_lost
        self._end()
        if self._stream is not None:
            self._stream.abort()
        on_lost(cause)

    def _end(self) -> None:
        self._ended = True
        self._on_frame = self._on_lost = _ignore


def _ignore(_: bytes | str) -> None:
    pass


def _keep_alive(tcp: socket.socket) -> None:
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

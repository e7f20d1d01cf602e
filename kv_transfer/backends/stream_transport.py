"""Listens and connects for networks whose links begin with a connection of control frames.

Owns the servers and the set of links. A link is made for each connection and greeted: it is handed on once it has
`joined` its peer, and hung up on when it is a stranger or says nothing.

Connections are TCP, and within a host (more exactly, a network namespace of Linux) a Unix socket that is named after
the listener's instance: a frame then takes half the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable

import uvloop

from kv_transfer.backends.base import Link
from kv_transfer.backends.control import ControlStream
from pdserve.errors import TransferError

log = logging.getLogger(__name__)

PREAMBLE_TIMEOUT_S = 5.0


class StreamLink(Link):
    """A link over `stream`, which begins with `preamble`. `joined` is done once the peer's first frame has come and
    fits, or fails. Control frames that come before anybody listens wait for `attach`."""

    def __init__(self, preamble: bytes, on_close: Callable[[StreamLink], None]) -> None:
        self._on_close = on_close
        self._on_control: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._early: list[bytes] = []
        self._lost: str | None = None
        self._closed = False
        self.joined: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stream = ControlStream(preamble, self._receive, self._lose)

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        early, self._early = self._early, []
        for frame in early:
            on_control(frame)
        if self._lost is not None and not self._closed:
            on_lost(self._lost)

    @abstractmethod
    def _receive(self, frame: bytes) -> None:
        """A frame of the stream has come, the peer's preamble first."""

    def _deliver(self, frame: bytes) -> None:
        """`frame` is for whoever is attached."""
        if self._on_control is None:
            self._early.append(frame)
        else:
            self._on_control(frame)

    def _refuse(self, error: TransferError) -> None:
        """The peer can't be joined."""
        if not self.joined.done():
            self.joined.set_exception(error)
        self.stream.close()

    def _lose(self, cause: str) -> None:
        """The link is of no use any more. What is under way ends with `close`, which follows."""
        if self._closed or self._lost is not None:
            return
        self._lost = cause
        if not self.joined.done():
            self.joined.set_exception(TransferError(cause, "peer_lost"))
        if self._on_lost is not None:
            self._on_lost(cause)


class StreamTransport(ABC):
    """`Transport` of links that begin with a connection of control frames."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []
        self._links: set[StreamLink] = set()
        self._greetings: set[asyncio.Task[None]] = set()

    @abstractmethod
    def new_link(self, on_close: Callable[[StreamLink], None]) -> StreamLink:
        """A link that is not connected yet, and calls `on_close` when it is closed.

        Raises:
            TransferError: "peer_lost", this end can't be made.
        """

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        loop = asyncio.get_running_loop()

        def accept() -> ControlStream:
            link = self._add_link()
            task = loop.create_task(self._welcome(link, on_link))
            self._greetings.add(task)
            task.add_done_callback(self._greetings.discard)
            return link.stream

        server = await loop.create_server(accept, host or None, port)
        self._servers.append(server)
        if sys.platform.startswith("linux"):
            with contextlib.suppress(OSError):  # the name is taken, or not allowed: then there is TCP
                self._servers.append(await loop.create_unix_server(accept, _local_name(instance)))
        return int(server.sockets[0].getsockname()[1])

    async def connect(self, host: str, port: int, instance: str) -> Link:
        loop, link = asyncio.get_running_loop(), self._add_link()
        try:
            if not await _connect_locally(link.stream, instance):
                await loop.create_connection(lambda: link.stream, host, port)
            await link.joined
        except OSError as error:
            link.close()
            raise TransferError(f"no KV transceiver answers at {host}:{port}: {error}", "peer_lost") from None
        except (TransferError, asyncio.CancelledError):
            link.close()
            raise
        return link

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._greetings):
            task.cancel()
        for link in list(self._links):
            link.close()
        await asyncio.sleep(0)  # lets the sockets close

    async def _welcome(self, link: StreamLink, on_link: Callable[[Link], None]) -> None:
        try:
            await asyncio.wait_for(link.joined, PREAMBLE_TIMEOUT_S)
        except (TransferError, TimeoutError) as error:
            log.warning("refused a connection to the KV transceiver: %s", error or "no preamble came")
            link.close()
        else:
            on_link(link)

    def _add_link(self) -> StreamLink:
        link = self.new_link(self._links.discard)
        self._links.add(link)
        return link


def _local_name(instance: str) -> str:
    """An address of Linux's abstract namespace, which is in no file system and ends with its socket."""
    return f"\0pdserve-kv-{instance}"


async def _connect_locally(stream: ControlStream, instance: str) -> bool:
    """Whether `stream` could be connected to `instance`, on this host."""
    if not sys.platform.startswith("linux"):
        return False
    loop = asyncio.get_running_loop()
    local = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        local.connect(_local_name(instance))
    except OSError:
        local.close()
        return False
    try:
        await loop.create_unix_connection(lambda: stream, sock=local)
    finally:
        if isinstance(loop, uvloop.Loop):
            local.detach()  # it closes the descriptor; so would we, when the number belongs to somebody else
    return True

"""Listens and connects for networks whose links begin with a connection of control frames: UCX and NIXL.

Owns the listening sockets and the set of links. Each side greets the other with a sealed frame (`greeting`). The side
that connects greets first. The side that listens answers only a greeting that fits, and makes nothing of its own
before. Then the link is handed on. These are hung up on: a stranger, whoever says nothing for `GREETING_TIMEOUT_S`, and
the oldest of more than `MAX_GREETINGS` that have said nothing yet.

Connections are TCP, and within a host (more exactly, a network namespace of Linux) a Unix socket that is named after
the listener's instance: a frame then takes half the time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import uvloop

from kv_transfer.networks.acceptor import Acceptor, bind, bind_locally
from kv_transfer.networks.base import Link
from kv_transfer.networks.control import ControlStream
from kv_transfer.networks.descriptors import OUT_OF_RESOURCES, Descriptors
from kv_transfer.networks.greeting import Seal
from pdserve.addresses import bare, host_port, is_loopback
from pdserve.errors import TransferError

log = logging.getLogger(__name__)

GREETING_TIMEOUT_S = 5.0
MAX_GREETINGS = 256
"""Connections that have not greeted yet. Peers greet within some ten milliseconds, but may all come at once."""

MAX_LINKS = 256
"""Accepted links. A link takes some MB and a dozen descriptors: more would be a fault, or no peers of ours."""

Fail = Callable[[TransferError], None]


class StreamLink(Link):
    """A network link over `stream`. Control frames that come before `attach` wait for it.

    Life cycle: connected → greetings in both directions → joined, if they fit, or refused → `close`.
    """

    def __init__(self, seal: Seal, on_close: Callable[[StreamLink], None]) -> None:
        self._seal = seal
        self._on_close = on_close
        self._on_control: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._early: list[bytes] = []
        self._lost: str | None = None
        self._closed = False
        self._greeted = False
        self._joined = False
        self._refusal: TransferError | None = None
        self._decided = asyncio.Event()
        self.stream = ControlStream(self._receive, self._lose)

    def greet(self, introduction: bytes | None = None) -> None:
        """Make this end and greet the peer. On the side that listens, `introduction` is the body of the peer's
        greeting.

        Raises:
            TransferError: this end can't be made.
        """
        self._greeted = True
        self.stream.send(self._seal.close(self._introduce(introduction)))

    async def joined(self) -> None:
        """Wait for the peer's greeting. Raises `TransferError` if it does not fit, or the connection is lost."""
        await self._decided.wait()
        if self._refusal is not None:
            raise TransferError(self._refusal.message, self._refusal.reason, self._refusal.param)

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_control, self._on_lost = on_control, on_lost
        early, self._early = self._early, []
        for frame in early:
            on_control(frame)
        if self._lost is not None and not self._closed:
            on_lost(self._lost)

    def close(self) -> None:
        """Close the connection and free, at once, all that belongs to the link. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self.stream.close()
        self._free()
        self._on_control = self._on_lost = None
        self._early.clear()
        self._on_close(self)

    @abstractmethod
    def _introduce(self, introduction: bytes | None) -> bytes:
        """Make this end, in answer to the peer's `introduction` if there is one; returns what the peer must know of it.

        Raises:
            TransferError: it can't be made.
        """

    @abstractmethod
    def _meet(self, introduction: bytes) -> None:
        """Connect to the peer's end, which `introduction` describes. Raises `TransferError` if that can't be done."""

    @abstractmethod
    def _hear(self, frame: bytes) -> None:
        """A frame of the peer's has come, after its greeting."""

    @abstractmethod
    def _free(self) -> None:
        """End what is under way, and give up what this end has made."""

    def _receive(self, frame: bytes) -> None:
        if self._joined:
            self._hear(frame)
            return
        try:
            introduction = self._seal.open(frame)
            if not self._greeted:
                self.greet(introduction)
            self._meet(introduction)
        except TransferError as error:
            self._decide(error)
            self.stream.close()
        else:
            self._joined = self.stream.trusted = True
            self._decide(None)

    def _deliver(self, frame: bytes) -> None:
        """Pass `frame` to whoever is attached, or keep it until somebody is."""
        if self._on_control is None:
            self._early.append(frame)
        else:
            self._on_control(frame)

    def _decide(self, refusal: TransferError | None) -> None:
        if not self._decided.is_set():
            self._refusal = refusal
            self._decided.set()

    def _lose(self, cause: str) -> None:
        """The connection is lost. The owner of the link calls `close`, which ends what is under way."""
        if self._closed or self._lost is not None:
            return
        self._lost = cause
        self._decide(TransferError(cause, "peer_lost"))
        if self._on_lost is not None:
            self._on_lost(cause)


class StreamNetwork(ABC):
    """`Network` of links that begin with a connection of control frames."""

    def __init__(self) -> None:
        self.descriptors = Descriptors()
        self._acceptors: list[Acceptor] = []
        self._links: set[StreamLink] = set()
        self._greetings: dict[asyncio.Task[None], None] = {}
        self._only_local = False
        self._fail: Fail = _log_failure

    @abstractmethod
    def new_link(self, on_close: Callable[[StreamLink], None]) -> StreamLink:
        """A link that is not connected yet, has made nothing yet, and calls `on_close` when it is closed."""

    @property
    def hindrance(self) -> str:
        return self.descriptors.hindrance

    def open(self, host: str, fail: Fail) -> None:
        self._only_local, self._fail = is_loopback(host), fail

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        listeners = await bind(host, port)
        port = int(listeners[0].getsockname()[1])
        accept = partial(self._accept, on_link)
        self._acceptors.append(Acceptor([*listeners, *bind_locally(_local_name(instance))], accept, self.descriptors))
        return port

    async def connect(self, host: str, port: int, instance: str) -> Link:
        link = self._add_link()
        try:
            if not await _connect_locally(link.stream, instance):
                await asyncio.get_running_loop().create_connection(lambda: link.stream, bare(host), port)
            link.greet()
            await link.joined()
        except OSError as error:
            link.close()
            if error.errno in OUT_OF_RESOURCES:
                self.descriptors.ran_out(error)
            at = host_port(host, port)
            raise TransferError(f"no KV transceiver answers at {at}: {error}", "peer_lost") from None
        except (TransferError, asyncio.CancelledError):
            link.close()
            raise
        return link

    async def close(self) -> None:
        while self._acceptors:
            self._acceptors.pop().close()
        self.descriptors.close()
        for task in list(self._greetings):
            task.cancel()
        for link in list(self._links):
            link.close()
        await asyncio.sleep(0)  # lets the sockets close

    def _accept(self, on_link: Callable[[Link], None], sock: socket.socket) -> None:
        if len(self._greetings) >= MAX_GREETINGS:
            next(iter(self._greetings)).cancel()  # whoever means it has greeted by now
        task = asyncio.get_running_loop().create_task(self._welcome(sock, on_link))
        self._greetings[task] = None
        task.add_done_callback(self._greetings.pop)

    async def _welcome(self, sock: socket.socket, on_link: Callable[[Link], None]) -> None:
        """The task's root: a connection becomes a link, or is closed with one line in the log."""
        link = self._add_link()
        why = "it was silent for too long, or others wait"
        try:
            async with asyncio.timeout(GREETING_TIMEOUT_S):
                await _adopt(sock, link.stream)
                if len(self._links) - len(self._greetings) >= MAX_LINKS:
                    raise TransferError(f"there are {MAX_LINKS} links", "refused")
                await link.joined()
        except (TransferError, OSError) as error:
            why = str(error) or why
        except asyncio.CancelledError:
            pass
        else:
            on_link(link)
            return
        if self._acceptors:
            log.warning("refused a connection from %s to the KV transceiver: %s", link.stream.peer, why)
        link.close()

    def _add_link(self) -> StreamLink:
        link = self.new_link(self._links.discard)
        self._links.add(link)
        return link


def _log_failure(error: TransferError) -> None:
    log.error("%s", error)


def _local_name(instance: str) -> str:
    """An address of Linux's abstract namespace, which is in no file system and ends with its socket."""
    return f"\0pdserve-kv-{instance}"


async def _adopt(sock: socket.socket, stream: ControlStream) -> None:
    """Have the loop carry `stream` over `sock`, which is connected."""
    loop = asyncio.get_running_loop()
    try:
        await loop.connect_accepted_socket(lambda: stream, sock)
    finally:
        if isinstance(loop, uvloop.Loop):
            sock.detach()  # it closes the descriptor; so would we, when the number belongs to somebody else


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
            local.detach()  # as in `_adopt`
    return True

"""Joins transceivers of one process, each in a thread of its own. For tests, and for reasoning about the protocol
without a network.

Ports are numbers in a table of this process. Every frame and payload is handed to the peer's loop; payload is copied
there, into the receive that was posted for its tag, and held back while there is none.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable

from torch import Tensor

from kv_transfer.networks.base import Link
from pdserve.errors import TransferError

_ports: dict[int, LoopbackNetwork] = {}
_free_ports = itertools.count(1 << 16)
_ports_lock = threading.Lock()


class LoopbackNetwork:
    """`Network` between the threads of this process."""

    name = "LOOPBACK"
    hindrance = ""

    def __init__(self) -> None:
        self._port: int | None = None
        self._on_link: Callable[[Link], None] | None = None
        self._links: set[LoopbackLink] = set()

    def open(self, host: str, fail: Callable[[TransferError], None]) -> None:
        pass

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        self._loop = asyncio.get_running_loop()
        self._on_link = on_link
        with _ports_lock:
            self._port = port or next(_free_ports)
            if self._port in _ports:
                raise OSError(f"loopback port {self._port} is taken")
            _ports[self._port] = self
        return self._port

    async def connect(self, host: str, port: int, instance: str) -> Link:
        with _ports_lock:
            listener = _ports.get(port)
        if listener is None:
            raise TransferError(f"no KV transceiver answers at loopback port {port}", "peer_lost")
        link = LoopbackLink(asyncio.get_running_loop(), self._links.discard)
        self._links.add(link)
        _call(listener._loop, lambda: listener._accept(link))
        return link

    async def close(self) -> None:
        with _ports_lock:
            if self._port is not None and _ports.get(self._port) is self:
                del _ports[self._port]
        for link in list(self._links):
            link.close()

    def _accept(self, peer: LoopbackLink) -> None:
        assert self._on_link is not None, "only a transport that listens is found by its port"
        link = LoopbackLink(self._loop, self._links.discard)
        self._links.add(link)
        link.meet(peer)
        _call(peer.loop, lambda: peer.meet(link))
        self._on_link(link)


class LoopbackLink:
    """One end. What it sends before the other end is there waits for `meet`."""

    transport = "memory"

    def __init__(self, loop: asyncio.AbstractEventLoop, on_close: Callable[[LoopbackLink], None]) -> None:
        self.loop = loop
        self._on_close = on_close
        self._peer: LoopbackLink | None = None
        self._unsent: list[Callable[[LoopbackLink], None]] = []
        self._on_control: Callable[[bytes], None] | None = None
        self._on_lost: Callable[[str], None] | None = None
        self._closed = False
        self._sends: set[asyncio.Future[None]] = set()
        self._receives: dict[int, tuple[Tensor, asyncio.Future[int]]] = {}
        self._held: dict[int, tuple[Tensor, Callable[[], object]]] = {}

    def meet(self, peer: LoopbackLink) -> None:
        self._peer = peer
        for deliver in self._unsent:
            self._tell(deliver)
        self._unsent.clear()

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_control, self._on_lost = on_control, on_lost

    def send_control(self, frame: bytes) -> None:
        self._tell(lambda peer: peer._receive_control(frame))

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self.loop.create_future()
        if self._closed:
            future.set_exception(TransferError("the link is closed", "peer_lost"))
            return future
        self._sends.add(future)
        copy = buffer.clone()  # the sender may reuse its buffer as soon as its end is closed

        def sent() -> None:
            self._sends.discard(future)
            if not future.done():
                future.set_result(None)

        self._tell(lambda peer: peer._receive_payload(tag, copy, lambda: _call(self.loop, sent)))
        return future

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        future: asyncio.Future[int] = self.loop.create_future()
        if self._closed:
            future.set_exception(TransferError("the link is closed", "peer_lost"))
            return future
        self._receives[tag] = (buffer, future)
        held = self._held.pop(tag, None)
        if held is not None:
            self._receive_payload(tag, *held)
        return future

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._tell(lambda peer: peer._lose("the peer closed the link"))
        self._abandon()
        self._on_close(self)

    def _tell(self, deliver: Callable[[LoopbackLink], None]) -> None:
        peer = self._peer
        if peer is None:
            self._unsent.append(deliver)
        elif not _call(peer.loop, lambda: deliver(peer)):
            _call(self.loop, lambda: self._lose("the peer's thread has ended"))

    def _receive_control(self, frame: bytes) -> None:
        if self._on_control is not None and not self._closed:
            self._on_control(frame)

    def _receive_payload(self, tag: int, buffer: Tensor, sent: Callable[[], object]) -> None:
        if self._closed:
            return
        posted = self._receives.pop(tag, None)
        if posted is None:
            self._held[tag] = (buffer, sent)
            return
        target, future = posted
        nbytes = min(buffer.numel(), target.numel())
        target[:nbytes].copy_(buffer[:nbytes])
        future.set_result(nbytes)
        sent()

    def _lose(self, cause: str) -> None:
        if self._closed:
            return
        self._abandon()
        if self._on_lost is not None:
            self._on_lost(cause)

    def _abandon(self) -> None:
        futures: list[asyncio.Future[None] | asyncio.Future[int]] = [*self._sends]
        futures += [future for _, future in self._receives.values()]
        self._sends.clear()
        self._receives.clear()
        self._held.clear()
        for future in futures:
            if not future.done():
                future.set_exception(TransferError("the link is closed", "peer_lost"))


def _call(loop: asyncio.AbstractEventLoop, callback: Callable[[], object]) -> bool:
    """Run `callback` in `loop`'s thread; False when that loop has ended."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        return False
    return True

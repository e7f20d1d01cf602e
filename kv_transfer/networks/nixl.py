"""NIXL: control frames over TCP, payload by one-sided writes into the receiver's buffers, one NIXL agent for each link.

To receive is to name memory: the link tells the peer the buffer's address (and, at the first one of an allocation,
how to write there). To send is to wait for that, to write, and, once NIXL has seen the last byte arrive, to say so.
All of this goes over the TCP connection, in between the transceiver's own frames::

    receiver                                sender
    MEMORY (a buffer, how to reach us)  →
    GRANT  (tag, address, bytes)        →
                                        ←   WRITING (tag): the receiver polls from now on
                                        ←   (the bytes, into memory)
                                        ←   LANDED (tag, bytes)

What MEMORY holds goes into NIXL as it is, so it is sealed as a greeting is.

Nobody reports a write that comes too late. What keeps it out of a buffer that has another owner by then: a buffer's
future is done when its write has landed, of which there is one for each grant, or else when the link's agent is
destroyed, and with it every way to write there (`nixl_agent`). Host memory only: between GPUs of one host UCX maps the
buffer into the peer, where no agent's end takes it back.

The extra is `nixl` (`nixl-cu12` for CUDA 12). UCX within NIXL reads the `UCX_*` environment, as in `ucx`.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from kv_transfer.networks.greeting import Seal
from kv_transfer.networks.nixl_agent import BACKEND_KEY, Agent, NixlApi
from kv_transfer.networks.nixl_polling import Polling
from kv_transfer.networks.stream_network import StreamLink, StreamNetwork
from pdserve.errors import ConfigError, TransferError

Result = TypeVar("Result")


class Kind(IntEnum):
    """What a frame is, by its first byte."""

    CONTROL = 0
    MEMORY = 1
    GRANT = 2
    WRITING = 3
    LANDED = 4


FIELDS = {Kind.GRANT: struct.Struct("!QQQ"), Kind.WRITING: struct.Struct("!Q"), Kind.LANDED: struct.Struct("!QQ")}


class Place(NamedTuple):
    """Where the peer lets us write."""

    address: int
    nbytes: int


@dataclass(eq=False, slots=True)
class _Send:
    """A payload that waits for its grant, or that `write` is under way for."""

    tag: int
    buffer: Tensor
    future: asyncio.Future[None]
    write: int | None = None


class NixlNetwork(StreamNetwork):
    """`Network` over NIXL, for buffers on `device`.

    Raises:
        ConfigError: `device` is a GPU, or as from `NixlApi`, or NIXL has no UCX.
    """

    name = "NIXL"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        if device.type != "cpu":
            raise ConfigError(
                "NIXL moves KV in host memory only: a buffer on a GPU can't be taken back from a peer that hangs; "
                "use UCX for this device",
                BACKEND_KEY,
            )
        self._api = NixlApi()
        self._seal = Seal(self.name)
        self._warm_up()

    def new_link(self, on_close: Callable[[StreamLink], None]) -> StreamLink:
        return NixlLink(self._make_agent, self._seal, on_close)

    def _make_agent(self, is_local: bool) -> Agent:
        self.descriptors.require()
        return Agent(self._api, only_loopback=self._only_local and is_local)

    def _warm_up(self) -> None:
        """Load NIXL's plugins, which takes half a second, before anybody waits for it."""
        try:
            Agent(self._api).close()
        except TransferError as error:
            raise ConfigError(f"NIXL has no UCX here: {error}", BACKEND_KEY) from None


class NixlLink(StreamLink):
    """`Link` over one TCP connection and one NIXL agent, which is made when this end introduces itself."""

    transport = "ucx"  # within which NIXL doesn't tell what carries the bytes

    _agent: Agent

    def __init__(self, make_agent: Callable[[bool], Agent], seal: Seal, on_close: Callable[[StreamLink], None]) -> None:
        super().__init__(seal, on_close)
        self._make_agent = make_agent
        self._has_agent = False
        self._loop = asyncio.get_running_loop()
        self._sends: list[_Send] = []
        self._places: dict[int, Place] = {}
        self._receives: dict[int, asyncio.Future[int]] = {}
        self._coming: set[int] = set()
        self._polling = Polling(self._look)

    def send_control(self, frame: bytes) -> None:
        self._tell(Kind.CONTROL, frame)

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        if self._closed:
            return _fail(future)
        send = _Send(tag, buffer, future)
        self._sends.append(send)
        self._start(send)
        return future

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        future: asyncio.Future[int] = self._loop.create_future()
        if self._closed:
            return _fail(future)
        try:
            metadata = self._agent.expose(buffer)
        except TransferError as error:
            self._lose_soon(error)
            return _fail(future)
        self._receives[tag] = future
        if metadata is not None:
            self._tell(Kind.MEMORY, self._seal.close(metadata))
        self._tell_numbers(Kind.GRANT, tag, buffer.data_ptr(), buffer.numel())
        return future

    def _introduce(self, introduction: bytes | None) -> bytes:
        self._agent, self._has_agent = self._make_agent(self.stream.is_local), True
        return b""

    def _meet(self, introduction: bytes) -> None:
        pass

    def _free(self) -> None:
        self._polling.stop()
        if not self._has_agent or self._agent.close():
            for send in self._sends:
                _fail(send.future)
            for future in self._receives.values():
                _fail(future)
        self._sends.clear()
        self._receives.clear()

    def _tell(self, kind: Kind, body: bytes) -> None:
        self.stream.send(bytes((kind,)) + body)

    def _tell_numbers(self, kind: Kind, *numbers: int) -> None:
        self._tell(kind, FIELDS[kind].pack(*numbers))

    def _hear(self, frame: bytes) -> None:
        if frame[:1] == bytes((Kind.CONTROL,)):
            self._deliver(frame[1:])
        elif not self._closed:
            try:
                self._understand(Kind(frame[0]), frame[1:])
            except (IndexError, ValueError, struct.error):
                self._lose("the peer sent a malformed frame")
            except TransferError as error:
                self._lose_soon(error)

    def _understand(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.MEMORY:
            self._agent.meet(self._seal.open(body))
            return
        tag, *numbers = FIELDS[kind].unpack(body)
        if kind is Kind.GRANT:
            self._places[tag] = Place(*numbers)
            waiting = next((send for send in self._sends if send.tag == tag and send.write is None), None)
            if waiting is not None:
                self._start(waiting)
        elif kind is Kind.WRITING and tag in self._receives:
            self._coming.add(tag)
            self._polling.wake()
        elif kind is Kind.LANDED and tag in self._receives:
            self._coming.discard(tag)
            self._polling.wake()  # the next one often follows at once
            _succeed(self._receives.pop(tag), numbers[0])

    def _start(self, send: _Send) -> None:
        """Write, if the peer has named a place for it. A grant is good for one write."""
        place = self._places.pop(send.tag, None)
        if place is None:
            return
        send.buffer = send.buffer[: place.nbytes]
        self._tell_numbers(Kind.WRITING, send.tag)
        try:
            send.write = self._agent.write(send.buffer, place.address)
        except TransferError as error:
            self._lose_soon(error)
        self._polling.wake()

    def _look(self) -> bool:
        """Make progress, and finish what has landed. Whether more is under way."""
        try:
            if self._coming:
                self._agent.progress()
            under_way = [(send, send.write) for send in self._sends if send.write is not None]
            landed = [send for send, write in under_way if self._agent.is_done(write)]
        except TransferError as error:
            self._lose_soon(error)
            return False
        for send in landed:
            self._sends.remove(send)
            self._tell_numbers(Kind.LANDED, send.tag, send.buffer.numel())
            self._polling.wake()
            _succeed(send.future, None)
        return len(under_way) > len(landed) or bool(self._coming)

    def _lose_soon(self, error: TransferError) -> None:
        """Not in this turn: the caller is busy with what it ends, and `error` holds the agent's frames, which keep it
        alive."""
        self._loop.call_soon(self._lose, error.message)

    def _lose(self, cause: str) -> None:
        self._polling.stop()
        super()._lose(cause)


def _succeed(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[Result]) -> asyncio.Future[Result]:
    if not future.done():
        future.set_exception(TransferError("the link is closed", "peer_lost"))
    return future

"""A loopback network that does to chosen messages what networks are feared for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kv_transfer.backends.base import Link, Transport
from kv_transfer.backends.loopback import LoopbackTransport
from kv_transfer.wire import decode

Fault = Literal["drop", "dup", "truncate", "late"]
Decide = Callable[[str], Fault | None]
FAULTS: tuple[Fault, ...] = ("drop", "dup", "truncate", "late")
LATE_S = 0.05


class FaultyTransport:
    """`decide` is asked about every control message, by its type's name, and every "payload"."""

    name = "LOOPBACK"

    def __init__(self, decide: Decide, inner: Transport | None = None) -> None:
        self._decide = decide
        self._inner = inner or LoopbackTransport()

    async def listen(self, host: str, port: int, on_link: Callable[[Link], None]) -> int:
        return await self._inner.listen(host, port, lambda link: on_link(FaultyLink(link, self._decide)))

    async def connect(self, host: str, port: int) -> Link:
        return FaultyLink(await self._inner.connect(host, port), self._decide)

    async def close(self) -> None:
        await self._inner.close()


class FaultyLink:
    """Faults are in what this end sends. A late frame holds back those behind it, for a link keeps order."""

    def __init__(self, inner: Link, decide: Decide) -> None:
        self._inner = inner
        self._decide = decide
        self._held: list[bytes] | None = None

    @property
    def transport(self) -> str:
        return self._inner.transport

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._inner.attach(on_control, on_lost)

    def send_control(self, frame: bytes) -> None:
        fault = self._decide(type(decode(frame)).__name__)
        if self._held is not None:
            self._held.append(frame)
        elif fault == "late":
            self._held = [frame]
            asyncio.get_running_loop().call_later(LATE_S, self._let_go)
        elif fault != "drop":
            self._inner.send_control(frame[:-1] if fault == "truncate" else frame)
            if fault == "dup":
                self._inner.send_control(frame)

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        fault = self._decide("payload")
        if fault == "drop":
            sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            sent.set_result(None)
            return sent
        future = self._inner.send_payload(tag, buffer[:-1] if fault == "truncate" else buffer)
        if fault == "dup":
            self._inner.send_payload(tag, buffer).add_done_callback(lambda future: future.exception())
        return future

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        return self._inner.recv_payload(tag, buffer)

    def close(self) -> None:
        self._inner.close()

    def _let_go(self) -> None:
        held, self._held = self._held or [], None
        for frame in held:
            self._inner.send_control(frame)

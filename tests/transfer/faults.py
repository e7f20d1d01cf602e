"""A network that does to chosen messages what networks are feared for. Over loopback, or any other transport."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Literal

from torch import Tensor

from kv_transfer.networks.base import Link, Network
from kv_transfer.networks.loopback import LoopbackNetwork
from kv_transfer.wire import decode
from pdserve.errors import TransferError

Fault = Literal["drop", "dup", "truncate", "late", "reorder", "corrupt", "cut", "pause", "freeze"]
Decide = Callable[[str], Fault | None]
FAULTS: tuple[Fault, ...] = ("drop", "dup", "truncate", "late", "reorder", "corrupt", "cut")
LATE_S = 0.05
SLEEPS_S: dict[str | None, float] = {"pause": 0.15, "freeze": 0.6}
"""How long a thread that is frozen in the act of sending stands still."""


class FaultyNetwork:
    """`decide` is asked about every control message, by its type's name, and every "payload"."""

    name = "LOOPBACK"

    def __init__(self, decide: Decide, inner: Network | None = None) -> None:
        self._decide = decide
        self._inner = inner or LoopbackNetwork()

    @property
    def hindrance(self) -> str:
        return self._inner.hindrance

    def open(self, host: str, fail: Callable[[TransferError], None]) -> None:
        self._inner.open(host, fail)

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        return await self._inner.listen(host, port, instance, lambda link: on_link(FaultyLink(link, self._decide)))

    async def connect(self, host: str, port: int, instance: str) -> Link:
        return FaultyLink(await self._inner.connect(host, port, instance), self._decide)

    async def close(self) -> None:
        await self._inner.close()


class FaultyLink:
    """Faults are in what this end sends. A late frame holds back those behind it; one that is reordered does not, and
    comes after the next."""

    def __init__(self, inner: Link, decide: Decide) -> None:
        self._inner = inner
        self._decide = decide
        self._held: list[bytes] | None = None
        self._overtaken: bytes | None = None
        self._on_lost: Callable[[str], None] = lambda cause: None

    @property
    def transport(self) -> str:
        return self._inner.transport

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        self._on_lost = on_lost
        self._inner.attach(on_control, on_lost)

    def send_control(self, frame: bytes) -> None:
        fault = self._decide(type(decode(frame)).__name__)
        time.sleep(SLEEPS_S.get(fault, 0.0))
        if fault == "cut":
            self.cut()
        elif fault == "reorder" and self._overtaken is None:
            self._overtaken = frame
            asyncio.get_running_loop().call_later(LATE_S, self._catch_up)
        elif fault == "late" and self._held is None:
            self._held = [frame]
            asyncio.get_running_loop().call_later(LATE_S, self._let_go)
        elif fault != "drop":
            self._pass(_spoiled(frame, fault))
            if fault == "dup":
                self._pass(frame)
            self._catch_up()

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        loop, fault = asyncio.get_running_loop(), self._decide("payload")
        time.sleep(SLEEPS_S.get(fault, 0.0))
        if fault == "drop":
            sent: asyncio.Future[None] = loop.create_future()
            sent.set_result(None)
            return sent
        if fault == "late":
            late: asyncio.Future[None] = loop.create_future()
            loop.call_later(LATE_S, self._send_late, tag, buffer, late)
            return late
        if fault == "cut":
            self.cut()
        if fault == "corrupt":
            buffer = buffer.clone()
            buffer[-1] ^= 1
        future = self._inner.send_payload(tag, buffer[:-1] if fault == "truncate" else buffer)
        if fault == "dup":
            self._inner.send_payload(tag, buffer).add_done_callback(lambda future: future.exception())
        return future

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        return self._inner.recv_payload(tag, buffer)

    def cut(self) -> None:
        """Lose the link, at both ends."""
        self._inner.close()
        asyncio.get_running_loop().call_soon(self._on_lost, "the link was cut")

    def close(self) -> None:
        self._on_lost = lambda cause: None
        self._inner.close()

    def _send_late(self, tag: int, buffer: Tensor, late: asyncio.Future[None]) -> None:
        def sent(future: asyncio.Future[None]) -> None:
            error = future.exception()
            late.set_result(None) if error is None else late.set_exception(error)

        self._inner.send_payload(tag, buffer).add_done_callback(sent)

    def _pass(self, frame: bytes) -> None:
        if self._held is None:
            self._inner.send_control(frame)
        else:
            self._held.append(frame)

    def _let_go(self) -> None:
        held, self._held = self._held or [], None
        for frame in held:
            self._inner.send_control(frame)

    def _catch_up(self) -> None:
        frame, self._overtaken = self._overtaken, None
        if frame is not None:
            self._pass(frame)


def _spoiled(frame: bytes, fault: Fault | None) -> bytes:
    if fault == "truncate":
        return frame[:-1]
    if fault == "corrupt":
        return frame[:-1] + bytes((frame[-1] ^ 1,))
    return frame


class Once:
    """Does `fault` to the `nth` message of that name."""

    def __init__(self, name: str, fault: Fault, nth: int = 1) -> None:
        self._name, self._fault, self._left = name, fault, nth
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Fault | None:
        with self._lock:
            self._left -= name == self._name
            return self._fault if name == self._name and self._left == 0 else None

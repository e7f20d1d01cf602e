"""What the transceiver asks of a network: links that carry ordered control frames and tagged payload.

A `Network` belongs to one event loop and all its calls are made there. A `Link` is one connection to one peer; the
side that connects is the sender of KV. Life of a link: made by `connect` or handed to `on_link` → `attach`, at once →
control and payload in both directions → `close`, or `on_lost` followed by `close`.

The rules that the rest of the transceiver builds on:

- Control frames arrive whole, in order, once, or the link is lost. `send_control` never blocks and never raises.
- A receive is posted when `recv_payload` returns; the peer is told its tag afterwards, so payload is never unexpected.
- When a payload's future is done, the network neither reads nor writes its buffer any more. `close` ends every future
  of its link under that same rule.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pdserve.errors import TransferError


class Link(Protocol):
    """One connection to one peer."""

    @property
    def transport(self) -> str:
        """What carries the payload ("tcp", "cuda_ipc,tcp"), as far as it is known by now."""
        ...

    def attach(self, on_control: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        """Deliver frames and, at most once and never after `close`, the loss of the link with its cause."""

    def send_control(self, frame: bytes) -> None: ...

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        """Send uint8 `[n]` under `tag`. The future fails with `TransferError` "peer_lost" when the link ends first."""
        ...

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        """Receive at most the buffer's bytes under `tag`. The future holds the number of bytes that came, or the
        buffer's size where the network doesn't tell; it fails as that of `send_payload` does."""
        ...

    def close(self) -> None: ...


class Network(Protocol):
    """The network as one transceiver sees it. `name` is the backend's, for counters.

    Life cycle: made → `open` → `listen`, `connect` → `close`.
    """

    name: str

    @property
    def hindrance(self) -> str:
        """Why no further link can be made for the moment; empty when it can. From any thread."""
        ...

    def open(self, host: str, fail: Callable[[TransferError], None]) -> None:
        """Called first. The transceiver is reached at `host`: if that is a loopback address, nothing of it is reached
        at another one. `fail` ends the transceiver, which can't go on."""

    async def listen(self, host: str, port: int, instance: str, on_link: Callable[[Link], None]) -> int:
        """Accept links at `host`:`port` (port 0 takes a free one) and return the port. `instance` is a name that no
        other listener has.

        Raises:
            OSError: the address is taken, or not this host's.
        """
        ...

    async def connect(self, host: str, port: int, instance: str) -> Link:
        """A link to the transceiver that listens there; to one on this host by its `instance`, where that is a shorter
        way. The caller bounds the wait.

        Raises:
            TransferError: "peer_lost", nobody answers there.
        """
        ...

    async def close(self) -> None:
        """Stop listening and close every link that is left."""

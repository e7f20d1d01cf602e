"""A receiver's connection from one sender: the handshake, tags, and which import a message is for.

Life cycle: connected, waiting for Hello → up, once Hello was found to fit → closed, when the connection is lost or
dropped; every import of it then fails. A Hello that does not fit is answered with the reason, and that was it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Protocol

from kv_transfer.backends.base import Link
from kv_transfer.connection import Connection
from kv_transfer.counters import PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.wire import Abort, Complete, Data, Hello, HelloReply, Message, Offer, Ready
from pdserve.errors import TRANSFER_REASONS, TransferError

GOODBYE_S = 1.0
"""How long a refused sender has to read why, before its connection is closed."""


class Puller(Protocol):
    """An import, as its connection sees it."""

    number: int

    def on_ready(self, num_blocks: int) -> None: ...
    def on_complete(self, first_token: int) -> None: ...
    def on_data(self, data: Data) -> None: ...
    def end(self, error: TransferError | None, tell_peer: bool = True) -> None: ...


class Inbound:
    """One sender's connection. `on_offer` decides on offers and may `add` an import; `on_closed` is called once."""

    counter: PeerCounter

    def __init__(
        self,
        env: Environment,
        link: Link,
        on_offer: Callable[[Offer, Inbound], None],
        on_closed: Callable[[Inbound], None],
    ) -> None:
        self.max_message_blocks = 0
        self._env = env
        self._on_offer = on_offer
        self._on_closed = on_closed
        self._imports: dict[int, Puller] = {}
        self._newest = 0
        self._tags = itertools.count(1)
        self._up = False
        self.connection = Connection(link, self._on_message, self._on_lost, env.stall_timeout_s)
        silent = TransferError("no Hello came", "protocol")
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(env.handshake_timeout_s, self.connection.drop, silent)
        self.connection.open()

    def next_tag(self) -> int:
        """A tag never used on this connection; tags only grow."""
        return next(self._tags)

    def add(self, entry: Puller) -> None:
        self._imports[entry.number] = entry

    def remove(self, entry: Puller) -> None:
        self._imports.pop(entry.number, None)

    def close(self, error: TransferError) -> None:
        self.connection.drop(error)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Hello):
            self._on_hello(message)
        elif not self._up:
            self.connection.drop(TransferError(f"a {type(message).__name__} came before Hello", "protocol"))
        elif isinstance(message, Offer):
            if message.handoff > self._newest:
                self._newest = message.handoff
                self._on_offer(message, self)
        elif isinstance(message, Ready | Data | Complete | Abort):
            if (entry := self._imports.get(message.handoff)) is not None:
                self._deliver(message, entry)
        else:
            self.connection.drop(TransferError(f"a sender sent a {type(message).__name__}", "protocol"))

    @staticmethod
    def _deliver(message: Ready | Data | Complete | Abort, entry: Puller) -> None:
        if isinstance(message, Ready):
            entry.on_ready(message.num_blocks)
        elif isinstance(message, Data):
            entry.on_data(message)
        elif isinstance(message, Complete):
            entry.on_complete(message.first_token)
        else:
            reason = message.reason if message.reason in TRANSFER_REASONS else "protocol"
            entry.end(TransferError(message.message, reason), tell_peer=False)

    def _on_hello(self, hello: Hello) -> None:
        if self._up:
            return
        self._expiry.cancel()
        error = self._misfit(hello)
        self.connection.send(HelloReply(self._env.worker_id, error.to_info() if error else None))
        if error is not None:
            self._expiry = asyncio.get_running_loop().call_later(GOODBYE_S, self.connection.drop, error)
            return
        self.max_message_blocks = hello.max_message_blocks
        self.counter = self.connection.counter = self._env.counters.of(hello.worker_id, "received")
        self._up = True

    def _misfit(self, hello: Hello) -> TransferError | None:
        if hello.instance != self._env.instance:
            return TransferError(f"{self._env.worker_id} has been restarted since its address was learnt", "refused")
        if hello.max_message_blocks < 1:
            return TransferError("messages must hold at least one block", "protocol", "max_message_blocks")
        return self._env.pool.layout.compare(hello.layout)

    def _on_lost(self, error: TransferError) -> None:
        self._expiry.cancel()
        for entry in list(self._imports.values()):
            entry.end(error, tell_peer=False)
        self._on_closed(self)

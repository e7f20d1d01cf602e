"""A receiver's connection from one rank of a sender: the handshake, tags, and which import a message is for.

Life cycle: connected, waiting for Hello → up, once Hello was found to fit → closed, when the connection is lost or
dropped; every import of it then fails. A Hello that does not fit is answered with the reason, and that was it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from kv_transfer.backends.base import Link
from kv_transfer.connection import Connection
from kv_transfer.counters import PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.reshard import Join, join
from kv_transfer.sender_pool import PoolOfSender, checked_pool
from kv_transfer.wire import (
    Abort,
    Complete,
    Data,
    Hello,
    HelloReply,
    Kept,
    Message,
    Offer,
    Ping,
    Readable,
    Ready,
    Sent,
)
from pdserve.errors import TransferError

MAX_OPEN = 16384
"""Handoffs that one sender rank may have open at a time. Most wait for a place, and only its own engine bounds that."""

GOODBYE_S = 1.0
"""How long a refused sender has to read why, before its connection is closed."""


class Puller(Protocol):
    """What an import gets of one sender rank, as its connection sees it."""

    number: int

    def on_ready(self, num_messages: int) -> None: ...
    def on_complete(self, complete: Complete) -> None: ...
    def on_data(self, data: Data) -> None: ...
    def on_sent(self, tag: int) -> None: ...
    def on_readable(self, readable: Readable) -> None: ...
    def on_kept(self, kept: Kept) -> None: ...
    def on_asked(self) -> None: ...
    def fail(self, error: TransferError) -> None: ...


class Inbound:
    """One sender rank's connection. `on_offer` decides on offers and may `add` a puller; `on_closed` is called once.

    `join`, `worker_id`, `counter` and `max_message_bytes` (what both sides' slots hold) are there once it is up, and
    `source` if the sender's pool can be read from here.
    """

    join: Join
    counter: PeerCounter

    def __init__(
        self,
        env: Environment,
        link: Link,
        slot_bytes: int,
        on_offer: Callable[[Offer, Inbound], None],
        on_closed: Callable[[Inbound], None],
    ) -> None:
        self.worker_id = ""
        self.source: PoolOfSender | None = None
        self.max_message_bytes = slot_bytes
        self._env = env
        self._on_offer = on_offer
        self._on_closed = on_closed
        self._pullers: dict[int, Puller] = {}
        self._newest = 0
        self._tags = itertools.count(1)
        self._greeted = self._up = False
        self.connection = Connection(link, self._on_message, self._on_lost, env.stall_timeout_s, env.checksum)
        silent = TransferError("no Hello came", "protocol")
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(env.handshake_timeout_s, self.connection.drop, silent)
        self.connection.open()

    def next_tag(self) -> int:
        """A tag never used on this connection; tags only grow."""
        return next(self._tags)

    def add(self, puller: Puller) -> None:
        self._pullers[puller.number] = puller

    def remove(self, puller: Puller) -> None:
        self._pullers.pop(puller.number, None)

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
                if len(self._pullers) < MAX_OPEN:
                    self._on_offer(message, self)
                else:
                    self.connection.send(Abort(message.handoff, "refused", f"{MAX_OPEN} handoffs are open already"))
        elif isinstance(message, Ping):
            self._on_ping(message)
        elif not isinstance(message, (Ready, Data, Sent, Readable, Kept, Complete, Abort)):
            self.connection.drop(TransferError(f"a sender sent a {type(message).__name__}", "protocol"))
        elif (puller := self._pullers.get(message.handoff)) is not None:
            _DELIVER[type(message)](puller, message)

    def _on_ping(self, ping: Ping) -> None:
        """The sender waits for something in these handoffs."""
        for number in ping.handoffs:
            puller = self._pullers.get(number)
            if puller is not None:
                puller.on_asked()
                continue
            self._newest = max(self._newest, number)  # should its offer still come, it is refused now
            self.connection.send(Abort(number, "protocol", f"{self._env.worker_id} does not know this handoff"))

    def _on_hello(self, hello: Hello) -> None:
        if self._greeted:
            return
        self._greeted = True
        self._expiry.cancel()
        try:
            self._check(hello)
            self.join = join(hello.layout, self._env.pool.layout, hello.share)
            self.max_message_bytes = min(hello.max_message_bytes, self.max_message_bytes)
            if self.join.max_units(self.max_message_bytes) < 1:
                raise TransferError("a message must hold at least a token of one layer", "protocol")
            checked_pool(self._env, hello, self.join, partial(self._come_up, hello))
        except TransferError as error:
            self.connection.send(HelloReply(self._env.worker_id, error=error.to_info()))
            self._expiry = asyncio.get_running_loop().call_later(GOODBYE_S, self.connection.drop, error)

    def _come_up(self, hello: Hello, source: PoolOfSender | None) -> None:
        """Everything is known of the sender."""
        if self.connection.dropped:  # while its pool was looked at
            if source is not None:
                source.close()
            return
        self.source = source
        reads = source is not None
        reply = HelloReply(self._env.worker_id, self._env.pool.layout, self.max_message_bytes, reads=reads)
        self.connection.send(reply)
        self.worker_id = hello.worker_id
        self.counter = self._env.counters.of(hello.worker_id, "received")
        self.connection.count_with(self.counter)
        self._up = True

    def _check(self, hello: Hello) -> None:
        if hello.instance != self._env.instance:
            raise TransferError(f"{self._env.worker_id} has been restarted since its address was learnt", "refused")

    def _on_lost(self, error: TransferError) -> None:
        self._expiry.cancel()
        for puller in list(self._pullers.values()):
            puller.fail(error)
        if self.source is not None:
            self.source.close()
        self._on_closed(self)


_DELIVER: dict[type[Message], Callable[[Puller, Any], None]] = {
    Ready: lambda puller, ready: puller.on_ready(ready.num_messages),
    Data: lambda puller, data: puller.on_data(data),
    Sent: lambda puller, sent: puller.on_sent(sent.tag),
    Readable: lambda puller, readable: puller.on_readable(readable),
    Kept: lambda puller, kept: puller.on_kept(kept),
    Complete: lambda puller, complete: puller.on_complete(complete),
    Abort: lambda puller, abort: puller.fail(abort.to_error()),
}

"""The link from one rank of a sender: the handshake, tags, and which share a message is for.

`Imports` makes it when a sender connects. Life cycle: connected, waiting for OpenLink → up, once OpenLink fits →
closed, when the connection is lost or dropped; then every import with a share of this link fails. An OpenLink that does
not fit is answered with the reason, and the connection is closed a moment later.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from generation_worker.readable_pool import ReadablePool, checked_pool
from kv_transfer.connection import Connection
from kv_transfer.counters import PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.networks.base import Link
from kv_transfer.routes import Terms, agree
from kv_transfer.wire import (
    Abort,
    Complete,
    Data,
    Kept,
    LinkAnswer,
    Message,
    Offer,
    OpenLink,
    Ping,
    Readable,
    Ready,
    Sent,
)
from pdserve.errors import TransferError

if TYPE_CHECKING:
    from generation_worker.share import ImportShare

MAX_OPEN = 16384
"""The most handoffs that one rank of a sender may have open. Most of them wait for blocks; the sender's engine alone
limits how many there are."""

GOODBYE_S = 1.0
"""How long a refused sender has to read why, before its connection is closed."""


class ImportLink:
    """See the module.

    Args:
        link: the network's, just connected.
        buffer_bytes: the size of a staging buffer.
        on_offer: decides on an offer; it may `add` a share to this link.
        on_closed: called once, when the link is closed.

    Attributes:
        terms, worker_id, counter: set once it is up.
        source: the sender's pool, if it can be read from here; None: KV comes in messages.
    """

    terms: Terms
    counter: PeerCounter

    def __init__(
        self,
        env: Environment,
        link: Link,
        buffer_bytes: int,
        on_offer: Callable[[Offer, ImportLink], None],
        on_closed: Callable[[ImportLink], None],
    ) -> None:
        self.worker_id = ""
        self.source: ReadablePool | None = None
        self._buffer_bytes = buffer_bytes
        self._env = env
        self._on_offer = on_offer
        self._on_closed = on_closed
        self._shares: dict[int, ImportShare] = {}
        self._newest = 0
        self._tags = itertools.count(1)
        self._greeted = self._up = False
        self.connection = Connection(link, self._on_message, self._on_lost, env.stall_timeout_s, env.config.checksum)
        silent = TransferError("no OpenLink came", "protocol")
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(env.handshake_timeout_s, self.connection.drop, silent)
        self.connection.open()

    def next_tag(self) -> int:
        """A tag never used on this connection; tags only grow."""
        return next(self._tags)

    def add(self, share: ImportShare) -> None:
        self._shares[share.number] = share

    def remove(self, share: ImportShare) -> None:
        self._shares.pop(share.number, None)

    def close(self, error: TransferError) -> None:
        self.connection.drop(error)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, OpenLink):
            self._on_opening(message)
        elif not self._up:
            self.connection.drop(TransferError(f"a {type(message).__name__} came before OpenLink", "protocol"))
        elif isinstance(message, Offer):
            if message.handoff > self._newest:
                self._newest = message.handoff
                if len(self._shares) < MAX_OPEN:
                    self._on_offer(message, self)
                else:
                    self.connection.send(Abort(message.handoff, "refused", f"{MAX_OPEN} handoffs are open already"))
        elif isinstance(message, Ping):
            self._on_ping(message)
        elif not isinstance(message, (Ready, Data, Sent, Readable, Kept, Complete, Abort)):
            self.connection.drop(TransferError(f"a sender sent a {type(message).__name__}", "protocol"))
        elif (share := self._shares.get(message.handoff)) is not None:
            _DELIVER[type(message)](share, message)

    def _on_ping(self, ping: Ping) -> None:
        """The sender waits for us in the handoffs that it names. Tell it of those that are over here."""
        for number in ping.handoffs:
            share = self._shares.get(number)
            if share is not None:
                share.on_asked()
                continue
            self._newest = max(self._newest, number)  # should its offer still come, it is refused now
            self.connection.send(Abort(number, "protocol", f"{self._env.worker_id} does not know this handoff"))

    def _on_opening(self, opening: OpenLink) -> None:
        if self._greeted:
            return
        self._greeted = True
        self._expiry.cancel()
        try:
            self._check(opening)
            ours, max_bytes = self._env.pool.layout, min(opening.max_message_bytes, self._buffer_bytes)
            self.terms = agree(ours, opening.layout, ours, opening.shares, max_bytes)
            checked_pool(self._env, opening, self.terms, partial(self._come_up, opening))
        except TransferError as error:
            self.connection.send(LinkAnswer(self._env.worker_id, error=error.to_info()))
            self._expiry = asyncio.get_running_loop().call_later(GOODBYE_S, self.connection.drop, error)

    def _come_up(self, opening: OpenLink, source: ReadablePool | None) -> None:
        """OpenLink fits, and it is known whether the sender's pool can be read: answer, and take offers from now on."""
        if self.connection.dropped:  # while its pool was looked at
            if source is not None:
                source.close()
            return
        self.source = source
        reads = source is not None
        reply = LinkAnswer(self._env.worker_id, self._env.pool.layout, self.terms.max_bytes, reads=reads)
        self.connection.send(reply)
        self.worker_id = opening.worker_id
        self.counter = self._env.counters.of(opening.worker_id, "received")
        self.connection.count_with(self.counter)
        self._up = True

    def _check(self, opening: OpenLink) -> None:
        if opening.instance != self._env.instance:
            raise TransferError(f"{self._env.worker_id} has been restarted since its address was learnt", "refused")

    def _on_lost(self, error: TransferError) -> None:
        self._expiry.cancel()
        for share in list(self._shares.values()):
            share.fail(error)
        if self.source is not None:
            self.source.close()
        self._on_closed(self)


_DELIVER: dict[type[Message], Callable[[ImportShare, Any], None]] = {
    Ready: lambda share, ready: share.on_ready(ready.num_messages),
    Data: lambda share, data: share.on_data(data),
    Sent: lambda share, sent: share.on_sent(sent.tag),
    Readable: lambda share, readable: share.on_readable(readable),
    Kept: lambda share, kept: share.on_kept(kept),
    Complete: lambda share, complete: share.on_complete(complete),
    Abort: lambda share, abort: share.fail(abort.to_error()),
}

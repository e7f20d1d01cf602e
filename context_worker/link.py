"""The link to one rank of a receiver: connecting, the handshake, and which share a message is for.

`Exports` makes it with the first offer to that peer. Life cycle: connecting → up, once the receiver has answered our
OpenLink → closed, when it fails, is lost, or the transceiver closes. A closed link never comes up again; the next offer
to that peer makes a new one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from kv_transfer import pieces
from kv_transfer.connection import Connection
from kv_transfer.environment import Environment
from kv_transfer.routes import Shares, Terms, agree
from kv_transfer.wire import Abort, Accept, Data, Done, Grant, LinkAnswer, Message, OpenLink, Ping
from pdserve.errors import PdserveError, TransferError, from_info

if TYPE_CHECKING:
    from context_worker.share import ExportShare

log = logging.getLogger(__name__)


class ReceiverRank(NamedTuple):
    """A rank of a receiver: where it is, and the `shares` that it gets of this rank. `rank` is its number, for logs."""

    worker_id: str
    rank: int
    instance: str
    host: str
    port: int
    shares: Shares

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.worker_id} at {self.host}:{self.port}"


class _Nobody:
    """The owner of empty payloads, which redeem grants of handoffs that are over."""

    number = 0
    ended_at_s: float | None = None


class ExportLink:
    """The link to `receiver`. It is made in the transceiver's loop, and connects from then on.

    `proven`: a handoff over this link has ended well, so that messages need no probe any more.
    """

    def __init__(self, env: Environment, receiver: ReceiverRank, max_message_bytes: int) -> None:
        self.receiver = receiver
        self.closed = False
        self.proven = False
        self._env = env
        self._max_message_bytes = max_message_bytes
        self._numbers = itertools.count(1)
        self._shares: dict[int, ExportShare] = {}
        self._connection: Connection | None = None
        self._up: tuple[Connection, Terms] | None = None
        self._answer: asyncio.Future[LinkAnswer] = asyncio.get_running_loop().create_future()
        self._last_tag = 0
        self._empty = torch.zeros(1, dtype=torch.uint8, device=env.pool.device)
        self._task = asyncio.get_running_loop().create_task(self._connect())

    @property
    def is_idle(self) -> bool:
        """Whether no export needs it now."""
        return not self._shares

    def add(self, share: ExportShare) -> None:
        """Offer `share` to the peer, now or as soon as the connection is up."""
        share.number = next(self._numbers)
        self._shares[share.number] = share
        if self._up is not None:
            share.start(*self._up)

    def remove(self, share: ExportShare) -> None:
        self._shares.pop(share.number, None)

    def give_back(self, grant: Grant, owner: ExportShare | _Nobody) -> None:
        """Redeem `grant` with an empty payload, so that the peer gets its buffer back."""
        if self._connection is not None:
            self._connection.send(Data(grant.handoff, grant.tag))
            self._connection.send_payload(grant.tag, self._empty, owner)

    def probe(self, payload: torch.Tensor) -> int | None:
        """A short checksum of `payload`, by which the peer sees whether the network delivers what was sent; None once
        the link is proven."""
        return None if self.proven else self._env.copier.probe(payload)

    def close(self, error: TransferError) -> None:
        """End all handoffs over this link with `error`, and close the connection."""
        self._task.cancel()
        if self._connection is not None and not self._connection.dropped:
            self._connection.drop(error)
        else:
            self._fail(error)

    async def _connect(self) -> None:
        """The task's root: if it fails, in whatever way, every share is told."""
        try:
            async with asyncio.timeout(self._env.handshake_timeout_s):
                env, receiver = self._env, self.receiver
                link = await env.network.connect(receiver.host, receiver.port, receiver.instance)
                connection = Connection(link, self._on_message, self._fail, env.stall_timeout_s, env.config.checksum)
                connection.count_with(env.counters.of(receiver.worker_id, "sent"))
                self._connection = connection
                connection.open()
                connection.send(self._opening())
                reply = await self._answer
            self._come_up(connection, reply)
        except TimeoutError:
            waited_s = self._env.handshake_timeout_s
            self.close(TransferError(f"{self.receiver} did not answer within {waited_s} s", "peer_lost"))
        except TransferError as error:
            self.close(error)
        except Exception as error:
            log.exception("connecting to %s failed", self.receiver)
            self.close(TransferError(f"connecting to {self.receiver} failed: {error}", "peer_lost"))

    def _opening(self) -> OpenLink:
        env, receiver = self._env, self.receiver
        layout, pools = env.pool.layout, env.own_pools
        return OpenLink(env.worker_id, receiver.instance, layout, receiver.shares, self._max_message_bytes, pools)

    def _come_up(self, connection: Connection, reply: LinkAnswer) -> None:
        if reply.error is not None:
            raise _as_transfer_error(from_info(reply.error))
        if reply.layout is None:
            raise TransferError(f"{self.receiver} did not say what its pool looks like", "protocol")
        if self.closed:
            return
        env, ours = self._env, self._env.pool.layout
        max_bytes = min(reply.max_message_bytes, self._max_message_bytes)
        if reply.reads:
            max_bytes = pieces.read_bytes(env.config.checksum)
        terms = agree(ours, ours, reply.layout, self.receiver.shares, max_bytes)
        if reply.reads and not (env.own_pools and terms.whole_blocks):
            raise TransferError(f"{self.receiver} wants to read what it was not given", "protocol")
        self._up = connection, replace(terms, reads=reply.reads)
        for share in list(self._shares.values()):
            share.start(*self._up)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, LinkAnswer):
            if not self._answer.done():
                self._answer.set_result(message)
        elif self._up is None:
            self._drop(TransferError(f"a {type(message).__name__} came before LinkAnswer", "protocol"))
        elif isinstance(message, Grant):
            self._on_grant(message)
        elif isinstance(message, Accept):
            if (share := self._find(message.handoff)) is not None:
                share.on_accept(message.first_token)
        elif isinstance(message, Ping):
            for number in message.handoffs:
                if (share := self._find(number)) is not None:
                    share.on_asked()
        elif isinstance(message, Done):
            if (share := self._shares.get(message.handoff)) is not None:
                share.on_done(message.read_s)
        elif isinstance(message, Abort):
            # Done may have crossed our Ping, which the peer then answers as that of a handoff it does not know.
            if (share := self._shares.get(message.handoff)) is not None and not share.done:
                share.fail(message.to_error())
        else:
            self._drop(TransferError(f"a receiver sent a {type(message).__name__}", "protocol"))

    def _drop(self, error: TransferError) -> None:
        if self._connection is not None:
            self._connection.drop(error)

    def _find(self, handoff: int) -> ExportShare | None:
        """The share that the peer's message is for. If there is none, tell the peer that its handoff is over."""
        share = self._shares.get(handoff)
        if share is None and self._connection is not None:
            self._connection.send(Abort(handoff, "protocol", f"{self._env.worker_id} does not know this handoff"))
        return share

    def _on_grant(self, grant: Grant) -> None:
        if grant.tag <= self._last_tag:
            return  # seen before: its tag must not be used twice
        self._last_tag = grant.tag
        share = self._shares.get(grant.handoff)
        if share is not None:
            share.on_grant(grant)
        else:
            self.give_back(grant, _Nobody())

    def _fail(self, error: TransferError) -> None:
        self.closed = True
        self._up = None
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # read here, in case that nobody waits any more
        for share in list(self._shares.values()):
            share.fail(error)


def _as_transfer_error(error: PdserveError) -> TransferError:
    return error if isinstance(error, TransferError) else TransferError(error.message, "refused", error.param)

"""A sender's connection to one rank of a receiver: connecting, the handshake, and which export a message is for.

Life cycle: connecting, from the first offer → up, once the receiver has answered our Hello → closed, for good: when the
connection fails, is lost, or the transceiver closes. The next offer to that peer makes a new one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import NamedTuple, Protocol

import torch

from kv_transfer import plan
from kv_transfer.backends.base import Transport
from kv_transfer.connection import Connection
from kv_transfer.environment import Environment
from kv_transfer.reshard import Join, Share, join
from kv_transfer.wire import Abort, Accept, Data, Done, Grant, Hello, HelloReply, Message, Ping
from pdserve.errors import PdserveError, TransferError, from_info

log = logging.getLogger(__name__)


class Target(NamedTuple):
    """A rank of a receiver, and what it gets of this one. `rank` is its number, for people."""

    worker_id: str
    rank: int
    instance: str
    host: str
    port: int
    share: Share

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.worker_id} at {self.host}:{self.port}"


class Terms(NamedTuple):
    """How KV goes to a receiver: in messages of at most `max_units`, or in pieces of so many that it `reads` itself."""

    join: Join
    max_units: int
    reads: bool


class Pusher(Protocol):
    """An export's share for one receiver rank, as its connection sees it."""

    number: int
    done: bool

    @property
    def ended_at_s(self) -> float | None: ...

    def introduce(self, connection: Connection, terms: Terms) -> None: ...
    def on_accept(self, first_token: int) -> None: ...
    def on_grant(self, grant: Grant) -> None: ...
    def on_done(self, read_s: float) -> None: ...
    def on_asked(self) -> None: ...
    def fail(self, error: TransferError) -> None: ...


class _Nobody:
    """Owns the empty payloads that give back grants of handoffs which are over."""

    number = 0
    ended_at_s: float | None = None


class Outbound:
    """The connection to `target`; made in the transceiver's loop, and connecting from then on. It is `proven` once a
    handoff over it has ended well."""

    def __init__(self, env: Environment, transport: Transport, target: Target, max_message_bytes: int) -> None:
        self.target = target
        self.closed = False
        self.proven = False
        self._env = env
        self._transport = transport
        self._max_message_bytes = max_message_bytes
        self._numbers = itertools.count(1)
        self._pushers: dict[int, Pusher] = {}
        self._connection: Connection | None = None
        self._joined: tuple[Connection, Terms] | None = None
        self._answer: asyncio.Future[HelloReply] = asyncio.get_running_loop().create_future()
        self._last_tag = 0
        self._empty = torch.zeros(1, dtype=torch.uint8, device=env.pool.tensor.device)
        self._task = asyncio.get_running_loop().create_task(self._connect())

    @property
    def is_idle(self) -> bool:
        """Whether no export needs it now."""
        return not self._pushers

    def add(self, pusher: Pusher) -> None:
        """Offer `pusher` to the peer, now or as soon as the connection is up."""
        pusher.number = next(self._numbers)
        self._pushers[pusher.number] = pusher
        if self._joined is not None:
            pusher.introduce(*self._joined)

    def remove(self, pusher: Pusher) -> None:
        self._pushers.pop(pusher.number, None)

    def give_back(self, grant: Grant, owner: Pusher | _Nobody) -> None:
        """Redeem `grant` with an empty payload."""
        if self._connection is not None:
            self._connection.send(Data(grant.handoff, grant.tag))
            self._connection.send_payload(grant.tag, self._empty, owner)

    def probe(self, payload: torch.Tensor) -> int | None:
        """What a message is probed by, until a handoff over this connection has ended well."""
        return None if self.proven else self._env.mover.probe(payload)

    def close(self, error: TransferError) -> None:
        """End what is left for `error`, and the connection."""
        self._task.cancel()
        if self._connection is not None and not self._connection.dropped:
            self._connection.drop(error)
        else:
            self._fail(error)

    async def _connect(self) -> None:
        """The task's root: whatever happens, every export gets to know."""
        try:
            async with asyncio.timeout(self._env.handshake_timeout_s):
                target = self.target
                link = await self._transport.connect(target.host, target.port, target.instance)
                env = self._env
                connection = Connection(link, self._on_message, self._fail, env.stall_timeout_s, env.checksum)
                connection.count_with(env.counters.of(self.target.worker_id, "sent"))
                self._connection = connection
                connection.open()
                connection.send(self._hello())
                reply = await self._answer
            self._come_up(connection, reply)
        except TimeoutError:
            waited_s = self._env.handshake_timeout_s
            self.close(TransferError(f"{self.target} did not answer within {waited_s} s", "peer_lost"))
        except TransferError as error:
            self.close(error)
        except Exception as error:
            log.exception("connecting to %s failed", self.target)
            self.close(TransferError(f"connecting to {self.target} failed: {error}", "peer_lost"))

    def _hello(self) -> Hello:
        layout = self._env.pool.layout
        target = self.target
        own_pool = self._env.own_pool
        return Hello(self._env.worker_id, target.instance, layout, target.share, self._max_message_bytes, own_pool)

    def _come_up(self, connection: Connection, reply: HelloReply) -> None:
        if reply.error is not None:
            raise _as_transfer_error(from_info(reply.error))
        if reply.layout is None:
            raise TransferError(f"{self.target} did not say what its pool looks like", "protocol")
        if self.closed:
            return
        joined = join(self._env.pool.layout, reply.layout, self.target.share)
        max_bytes = min(reply.max_message_bytes, self._max_message_bytes)
        if reply.reads:
            max_bytes = plan.read_bytes(self._env.checksum)
        max_units = joined.max_units(max_bytes)
        if reply.reads and (self._env.own_pool is None or not joined.whole_blocks):
            raise TransferError(f"{self.target} wants to read what it was not given", "protocol")
        if max_units < 1:
            raise TransferError(f"{self.target} takes no message that holds a token of one layer", "protocol")
        self._joined = connection, Terms(joined, max_units, reply.reads)
        for pusher in list(self._pushers.values()):
            pusher.introduce(*self._joined)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, HelloReply):
            if not self._answer.done():
                self._answer.set_result(message)
        elif self._joined is None:
            self._drop(TransferError(f"a {type(message).__name__} came before HelloReply", "protocol"))
        elif isinstance(message, Grant):
            self._on_grant(message)
        elif isinstance(message, Accept):
            if (pusher := self._find(message.handoff)) is not None:
                pusher.on_accept(message.first_token)
        elif isinstance(message, Ping):
            for number in message.handoffs:
                if (pusher := self._find(number)) is not None:
                    pusher.on_asked()
        elif isinstance(message, Done):
            if (pusher := self._pushers.get(message.handoff)) is not None:
                pusher.on_done(message.read_s)
        elif isinstance(message, Abort):
            # Done may have crossed our Ping, which the peer then answers as that of a handoff it does not know.
            if (pusher := self._pushers.get(message.handoff)) is not None and not pusher.done:
                pusher.fail(message.to_error())
        else:
            self._drop(TransferError(f"a receiver sent a {type(message).__name__}", "protocol"))

    def _drop(self, error: TransferError) -> None:
        if self._connection is not None:
            self._connection.drop(error)

    def _find(self, handoff: int) -> Pusher | None:
        """The pusher of a handoff that the peer waits for; if it is over, the peer has not heard of that."""
        pusher = self._pushers.get(handoff)
        if pusher is None and self._connection is not None:
            self._connection.send(Abort(handoff, "protocol", f"{self._env.worker_id} does not know this handoff"))
        return pusher

    def _on_grant(self, grant: Grant) -> None:
        if grant.tag <= self._last_tag:
            return  # seen before: its tag must not be used twice
        self._last_tag = grant.tag
        pusher = self._pushers.get(grant.handoff)
        if pusher is not None:
            pusher.on_grant(grant)
        else:
            self.give_back(grant, _Nobody())

    def _fail(self, error: TransferError) -> None:
        self.closed = True
        self._joined = None
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # read here, in case that nobody waits any more
        for pusher in list(self._pushers.values()):
            pusher.fail(error)


def _as_transfer_error(error: PdserveError) -> TransferError:
    return error if isinstance(error, TransferError) else TransferError(error.message, "refused", error.param)

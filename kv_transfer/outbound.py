"""A sender's connection to one receiver: connecting, the handshake, and which export a message is for.

Life cycle: connecting, from the first offer → up, once the receiver has answered our Hello → closed, for good: when the
connection fails, is lost, or the transceiver closes. The next offer to that peer makes a new one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Protocol

import torch

from kv_transfer.backends.base import Transport
from kv_transfer.connection import Connection
from kv_transfer.environment import Environment
from kv_transfer.wire import Abort, Data, Done, Grant, Hello, HelloReply, Message
from pdserve.errors import TRANSFER_REASONS, PdserveError, TransferError, from_info
from pdserve.protocol import KvAddress

log = logging.getLogger(__name__)


class Pusher(Protocol):
    """An export, as its connection sees it."""

    number: int
    ended_at_s: float | None

    def register(self, outbound: Outbound, number: int) -> None: ...
    def introduce(self, connection: Connection) -> None: ...
    def on_grant(self, grant: Grant) -> None: ...
    def on_done(self) -> None: ...
    def end(self, error: TransferError | None, tell_peer: bool = True) -> None: ...


class _Nobody:
    """Owns the empty payloads that give back grants of handoffs which are over."""

    ended_at_s: float | None = None


class Outbound:
    """The connection to `address`; made in the transceiver's loop, and connecting from then on."""

    def __init__(self, env: Environment, transport: Transport, address: KvAddress, max_message_blocks: int) -> None:
        self.closed = False
        self._env = env
        self._transport = transport
        self._address = address
        self._max_message_blocks = max_message_blocks
        self._numbers = itertools.count(1)
        self._exports: dict[int, Pusher] = {}
        self._connection: Connection | None = None
        self._up = False
        self._answer: asyncio.Future[HelloReply] = asyncio.get_running_loop().create_future()
        self._last_tag = 0
        self._empty = torch.zeros(1, dtype=torch.uint8, device=env.pool.tensor.device)
        self._task = asyncio.get_running_loop().create_task(self._connect())

    def add(self, export: Pusher) -> None:
        """Offer `export` to the peer, now or as soon as the connection is up."""
        number = next(self._numbers)
        self._exports[number] = export
        export.register(self, number)
        if self._up and self._connection is not None:
            export.introduce(self._connection)

    def remove(self, export: Pusher) -> None:
        self._exports.pop(export.number, None)

    def give_back(self, grant: Grant, owner: Pusher | _Nobody) -> None:
        """Redeem `grant` with an empty payload."""
        if self._connection is not None:
            self._connection.send(Data(grant.handoff, grant.tag, 0))
            self._connection.send_payload(grant.tag, self._empty, owner)

    def close(self, error: TransferError) -> None:
        """End what is left for `error`, and the connection."""
        self._task.cancel()
        if self._connection is not None and not self._connection.dropped:
            self._connection.drop(error)
        else:
            self._fail(error)

    async def _connect(self) -> None:
        """The task's root: whatever happens, every export gets to know."""
        where = f"{self._address.worker_id} at {self._address.host}:{self._address.port}"
        try:
            async with asyncio.timeout(self._env.handshake_timeout_s):
                link = await self._transport.connect(self._address.host, self._address.port)
                connection = Connection(link, self._on_message, self._fail, self._env.stall_timeout_s)
                connection.counter = self._env.counters.of(self._address.worker_id, "sent")
                self._connection = connection
                connection.open()
                connection.send(self._hello())
                reply = await self._answer
        except TimeoutError:
            self.close(TransferError(f"{where} did not answer within {self._env.handshake_timeout_s} s", "peer_lost"))
        except TransferError as error:
            self.close(error)
        except Exception as error:
            log.exception("connecting to %s failed", where)
            self.close(TransferError(f"connecting to {where} failed: {error}", "peer_lost"))
        else:
            self._come_up(connection, reply)

    def _hello(self) -> Hello:
        layout = self._env.pool.layout
        return Hello(self._env.worker_id, self._address.instance, layout, self._max_message_blocks)

    def _come_up(self, connection: Connection, reply: HelloReply) -> None:
        if reply.error is not None:
            self.close(_as_transfer_error(from_info(reply.error)))
        elif not self.closed:
            self._up = True
            for export in list(self._exports.values()):
                export.introduce(connection)

    def _on_message(self, message: Message) -> None:
        if isinstance(message, HelloReply):
            if not self._answer.done():
                self._answer.set_result(message)
        elif isinstance(message, Grant):
            self._on_grant(message)
        elif isinstance(message, Done):
            if (export := self._exports.get(message.handoff)) is not None:
                export.on_done()
        elif isinstance(message, Abort):
            if (export := self._exports.get(message.handoff)) is not None:
                reason = message.reason if message.reason in TRANSFER_REASONS else "protocol"
                export.end(TransferError(message.message, reason), tell_peer=False)
        elif self._connection is not None:
            self._connection.drop(TransferError(f"a receiver sent a {type(message).__name__}", "protocol"))

    def _on_grant(self, grant: Grant) -> None:
        if grant.tag <= self._last_tag:
            return  # seen before: its tag must not be used twice
        self._last_tag = grant.tag
        export = self._exports.get(grant.handoff)
        if export is not None:
            export.on_grant(grant)
        else:
            self.give_back(grant, _Nobody())

    def _fail(self, error: TransferError) -> None:
        self.closed = True
        self._up = False
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # read here, in case that nobody waits any more
        for export in list(self._exports.values()):
            export.end(error, tell_peer=False)


def _as_transfer_error(error: PdserveError) -> TransferError:
    return error if isinstance(error, TransferError) else TransferError(error.message, "refused", error.param)

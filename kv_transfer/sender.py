"""The context worker's half: offers handoffs and pushes blocks as they are computed and granted.

Owns the exports and their deadlines; the peers' connections are `outbound`'s. Runs in the transceiver's loop.

Life of an `Export`: offered (introduced to the peer once its connection is up) → blocks become ready, are granted,
packed, sent → every block ready and the first token known → Done from the peer, or ended early by an abort, the
deadline, or the loss of the connection. Its one event is posted when no pack reads its blocks any more.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kv_transfer import plan
from kv_transfer.connection import Connection
from kv_transfer.counters import PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.mover import checksum
from kv_transfer.outbound import Outbound
from kv_transfer.staging import Slot, Staging
from kv_transfer.wire import Abort, Complete, Data, Grant, Offer, Ready
from pdserve.errors import TransferError
from pdserve.handoff import ExportDone, ExportFailed, HandoffEvent
from pdserve.protocol import Key, KvAddress

log = logging.getLogger(__name__)


class Sender:
    """All exports of one transceiver. `connect_to` makes the connection to a peer at its first use."""

    def __init__(self, env: Environment, staging: Staging, connect_to: Callable[[KvAddress], Outbound]) -> None:
        self.env = env
        self.staging = staging
        self._connect_to = connect_to
        self._exports: dict[Key, Export] = {}
        self._peers: dict[KvAddress, Outbound] = {}

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, block_ids: Sequence[int]) -> None:
        assert key not in self._exports, f"{key} is offered already"
        outbound = self._peers.get(peer)
        if outbound is None or outbound.closed:
            outbound = self._peers[peer] = self._connect_to(peer)
        counter = self.env.counters.of(peer.worker_id, "sent")
        export = Export(self, key, num_tokens, block_ids, counter)
        self._exports[key] = export
        counter.handoff_started()
        outbound.add(export)

    def computed(self, key: Key, num_tokens: int) -> None:
        if (export := self._exports.get(key)) is not None:
            export.advance(num_tokens)

    def finish(self, key: Key, first_token: int) -> None:
        if (export := self._exports.get(key)) is not None:
            export.complete(first_token)

    def abort(self, key: Key) -> None:
        if (export := self._exports.get(key)) is not None:
            export.end(TransferError("the context worker withdrew the request", "aborted"))

    def close(self) -> None:
        """End every export and close every connection."""
        for export in list(self._exports.values()):
            export.end(TransferError("the context worker's transceiver was closed", "aborted"))
        for peer in list(self._peers.values()):
            peer.close(TransferError("closed", "aborted"))

    def forget(self, export: Export) -> None:
        """`export` has posted its event."""
        del self._exports[export.key]
        self._peers = {address: peer for address, peer in self._peers.items() if not peer.closed}


@dataclass(eq=False)
class Export:
    """One handoff on its way out. `block_ids` are the sequence's, of which the first `num_blocks` are handed over."""

    sender: Sender
    key: Key
    num_tokens: int
    block_ids: Sequence[int]
    counter: PeerCounter
    number: int = -1
    first_token: int | None = None
    ready_blocks: int = 0
    ended_at_s: float | None = None
    _connection: Connection | None = None
    _outbound: Outbound | None = None
    _grants: deque[Grant] = field(default_factory=deque)
    _packing: int = 0
    _event: HandoffEvent | None = None

    def __post_init__(self) -> None:
        env = self.sender.env
        self.num_blocks = plan.num_blocks(self.num_tokens, env.pool.layout.tokens_per_block)
        assert self.num_blocks <= len(self.block_ids), f"{self.key}: fewer blocks than its tokens take"
        self._block_ids = env.mover.block_ids(self.block_ids)
        expired = TransferError(f"the handoff took longer than {env.timeout_s} s", "timeout")
        self._deadline = asyncio.get_running_loop().call_later(env.timeout_s, self.end, expired)

    def register(self, outbound: Outbound, number: int) -> None:
        self._outbound, self.number = outbound, number

    def introduce(self, connection: Connection) -> None:
        """The connection is up: say everything that there is to say by now."""
        self._connection = connection
        connection.send(Offer(self.number, self.key, self.num_tokens))
        if self.ready_blocks:
            connection.send(Ready(self.number, self.ready_blocks))
        if self.first_token is not None:
            connection.send(Complete(self.number, self.first_token))

    def advance(self, computed_tokens: int) -> None:
        ready = plan.pushable_blocks(computed_tokens, self.num_tokens, self.sender.env.pool.layout.tokens_per_block)
        if ready <= self.ready_blocks or self.ended_at_s is not None:
            return
        self.ready_blocks = ready
        if self._connection is not None:
            self._connection.send(Ready(self.number, ready))

    def complete(self, first_token: int) -> None:
        self.advance(self.num_tokens)
        self.first_token = first_token
        if self._connection is not None and self.ended_at_s is None:
            self._connection.send(Complete(self.number, first_token))

    def on_grant(self, grant: Grant) -> None:
        in_range = 0 <= grant.first_block < grant.first_block + grant.num_blocks <= self.ready_blocks
        if not in_range or grant.num_blocks > self.sender.staging.slot_blocks:
            self.end(TransferError(f"the peer granted blocks that it was not offered: {grant}", "protocol"))
        self._grants.append(grant)
        if self.ended_at_s is not None:
            self._give_back_grants()
        else:
            self.sender.staging.request(self)

    def on_done(self) -> None:
        if self.first_token is None:
            self.end(TransferError("the peer was done before we were", "protocol"))
        else:
            self.end(None)

    @property
    def wants_slot(self) -> bool:
        return bool(self._grants)

    def take(self, slot: Slot) -> None:
        self._packing += 1
        self.sender.env.spawn(self._push(self._grants.popleft(), slot))

    def end(self, error: TransferError | None, tell_peer: bool = True) -> None:
        """End in success, or for `error`; the event follows once no pack reads the blocks."""
        if self.ended_at_s is not None:
            return
        self.ended_at_s = asyncio.get_running_loop().time()
        self._deadline.cancel()
        self.sender.staging.withdraw(self)
        self.counter.handoff_ended(error.reason if error else None)
        if error is not None and tell_peer and self._connection is not None:
            self._connection.send(Abort(self.number, error.reason, error.message))
        self._give_back_grants()
        if self._outbound is not None:
            self._outbound.remove(self)
        self._event = ExportFailed(self.key, error) if error else ExportDone(self.key)
        self._post_if_quiet()

    async def _push(self, grant: Grant, slot: Slot) -> None:
        env, connection = self.sender.env, self._connection
        assert connection is not None, "grants come over a connection"
        payload = slot.memory[: grant.num_blocks * env.pool.block_bytes]
        block_ids = self._block_ids[grant.first_block : grant.first_block + grant.num_blocks]
        try:
            try:
                await env.mover.pack(block_ids, payload)
            finally:
                self._packing -= 1
            if self.ended_at_s is None:
                crc32 = checksum(payload) if env.checksum else None
                await connection.send_payload(grant.tag, payload, self)
                connection.send(Data(self.number, grant.tag, payload.numel(), crc32))
                self.counter.moved(payload.numel(), connection.transport)
            else:
                self._grants.append(grant)
                self._give_back_grants()
        except TransferError:
            pass  # the connection is lost, and ends all its handoffs itself
        except Exception as error:
            log.exception("%s: pushing blocks failed", self.key)
            self.end(TransferError(f"the blocks could not be pushed: {error}", "aborted"))
        finally:
            self.sender.staging.release(slot)
            self._post_if_quiet()

    def _give_back_grants(self) -> None:
        while self._grants:
            assert self._outbound is not None, "grants come from a peer"
            self._outbound.give_back(self._grants.popleft(), self)

    def _post_if_quiet(self) -> None:
        if self._event is not None and self._packing == 0:
            event, self._event = self._event, None
            self.sender.forget(self)
            self.sender.env.post(event)

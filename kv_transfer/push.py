"""What one export sends to one receiver rank: says what is ready, redeems the peer's grants.

Life of a `Push`: offered (introduced to the peer once its connection is up) → accepted → said to be ready, granted,
packed, sent, piece by piece → Done from the peer, or ended with its export, of which it is one of several.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from kv_transfer import plan
from kv_transfer.connection import Connection, Ticket
from kv_transfer.counters import BusyClock, PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.layout import Span
from kv_transfer.mover import checksum
from kv_transfer.outbound import Outbound, Terms
from kv_transfer.peer_memory import transport_to
from kv_transfer.plan import Cursor, Frontier, Piece
from kv_transfer.staging import Slot, Staging
from kv_transfer.transfer_clock import TransferClock
from kv_transfer.wire import Abort, Complete, Data, Grant, Kept, Offer, Readable, Ready, Sent
from pdserve.errors import TransferError
from pdserve.protocol import Key

log = logging.getLogger(__name__)


class Source(Protocol):
    """The export, as its pushes see it: what they share."""

    key: Key
    num_tokens: int
    block_ids: Sequence[int]
    env: Environment
    staging: Staging
    counter: PeerCounter
    computed: Frontier
    block_table: Tensor
    first_token: int | None
    complete_at_s: float | None
    ended_at_s: float | None
    busy: BusyClock
    clock: TransferClock

    def pack_started(self) -> None: ...
    def pack_ended(self) -> None: ...
    def sent(self, nbytes: int) -> None: ...
    def promise(self, until_s: float) -> None: ...
    def on_push_done(self) -> None: ...
    def end(self, error: TransferError | None, heard_from: Push | None = None) -> None: ...


class Push:
    """One receiver rank's part of an export, over `outbound`."""

    number = -1

    def __init__(self, source: Source, outbound: Outbound) -> None:
        self.outbound = outbound
        self.done = False
        self.waited_s = 0.0
        self._source = source
        self._connection: Connection | None = None
        self._terms: Terms
        self._cursor: Cursor | None = None
        self._told_ready = 0
        self._expected: Ticket | None = None
        self._grants: deque[Grant] = deque()
        self._sending = 0
        self._readable_bytes = 0
        self._telling = False

    @property
    def ended_at_s(self) -> float | None:
        return self._source.ended_at_s

    def introduce(self, connection: Connection, terms: Terms) -> None:
        """The connection is up."""
        source = self._source
        self._connection, self._terms = connection, terms
        blocks = tuple(source.block_ids) if terms.reads else ()
        connection.send(Offer(self.number, source.key, source.num_tokens, blocks))
        # Also while the peer has no blocks yet, and when all is sent and lies in the network of one that is frozen.
        self._expected = connection.expect(self)

    def on_accept(self, first_token: int) -> None:
        """The peer has blocks, and needs what follows its `first_token` first tokens."""
        source, unit = self._source, self._terms.join.unit_tokens
        if self._cursor is not None:
            return
        if not 0 <= first_token <= source.num_tokens or (first_token % unit and first_token < source.num_tokens):
            source.end(TransferError(f"the peer asks for tokens from {first_token} on", "protocol"))
            return
        layers = self.outbound.target.share.layers
        self._cursor = Cursor(layers, first_token, source.num_tokens, unit, self._terms.max_units)
        for band, num_tokens in source.computed.bands:
            self._cursor.advance(num_tokens, band)
        if source.first_token is not None:
            self.complete()
        else:
            self._say_ready()

    def advance(self, num_tokens: int, layers: Span) -> None:
        """The first `num_tokens` tokens are computed in `layers`, some of which may be this peer's."""
        if self._cursor is not None:
            self._cursor.advance(num_tokens, layers)
            self._say_ready()

    def complete(self) -> None:
        """All is computed, and the first token known."""
        connection, cursor, first_token = self._connection, self._cursor, self._source.first_token
        if connection is None or cursor is None or first_token is None:
            return
        cursor.advance(self._source.num_tokens, self.outbound.target.share.layers)
        assert self._source.complete_at_s is not None, "the first token is known"
        self.waited_s = self.waited_s or time.monotonic() - self._source.complete_at_s
        knows_all = True
        if self._terms.reads:
            knows_all = self._let_read(connection, cursor)
        else:
            self._told_ready = cursor.num_ready
            self._request_slot()  # first, for on a GPU packing goes on meanwhile
        if knows_all:
            connection.send(Complete(self.number, first_token, cursor.num_ready, self.waited_s))
        self._source.clock.more(self)

    def close(self, error: TransferError | None, tell_peer: bool) -> None:
        """The export is over: give back what was granted, and go."""
        self._source.staging.withdraw(self)
        self._expect_no_more()
        self._source.env.poller.rest(self)
        if error is not None and tell_peer and self._connection is not None:
            self._connection.send(Abort(self.number, error.reason, error.message))
        self._give_back_grants()
        self.outbound.remove(self)

    def fail(self, error: TransferError) -> None:
        """The peer has ended the handoff, or is lost."""
        self._source.end(error, heard_from=self)

    def on_done(self, read_s: float) -> None:
        if self._source.first_token is None or self._cursor is None or self.wants_to_send or self._sending:
            self._source.end(TransferError("the peer was done before we were", "protocol"))
        elif not 0 <= read_s < math.inf:
            self._source.end(TransferError(f"the peer says that it has read for {read_s} s", "protocol"))
        elif not self.done:
            self.done = self.outbound.proven = True
            self._source.clock.none_left(self)
            self._expect_no_more()
            self._note_read(read_s)
            self._source.on_push_done()

    def on_grant(self, grant: Grant) -> None:
        self._grants.append(grant)
        if self.ended_at_s is not None:
            self._give_back_grants()
        elif len(self._grants) > plan.MAX_IN_FLIGHT:
            self._source.end(TransferError(f"the peer grants more than {plan.MAX_IN_FLIGHT} messages", "protocol"))
        else:
            self._request_slot()

    def on_asked(self) -> None:
        """The peer waits for something: if it reads, for longer than it was promised."""
        if self._readable_bytes and self._connection is not None:
            until_s = time.monotonic() + self._source.env.stall_timeout_s
            self._source.promise(until_s)
            self._connection.send(Kept(self.number, until_s))

    @property
    def wants_to_send(self) -> bool:
        """Whether something is computed that the peer was not sent, or told of."""
        return self._cursor is not None and self._cursor.has_next

    @property
    def wants_slot(self) -> bool:
        return bool(self._grants) and self.wants_to_send

    def take(self, slot: Slot) -> None:
        assert self._cursor is not None, "there is something to send"
        source, join, grant, piece = self._source, self._terms.join, self._grants.popleft(), self._cursor.take()
        payload = slot.memory[: join.nbytes(piece)]
        source.pack_started()
        self._sending += 1
        try:
            mark = source.env.mover.pack(source.block_table, piece, join, payload)
            source.env.poller.when(mark, partial(self._packed, grant, piece, slot, payload), soon=True)
        except Exception as error:
            log.exception("%s: packing failed", source.key)
            self._packed(grant, piece, slot, payload, error)
        if not self._grants:
            self._say_ready()

    def _request_slot(self) -> None:
        if self.wants_slot:
            self._source.staging.request(self)

    def _say_ready(self) -> None:
        """Tell the peer of further messages, and send those that it has granted already."""
        assert self._cursor is not None, "the peer has accepted"
        if self._terms.reads and self._connection is not None:
            self._let_read(self._connection, self._cursor)
            return
        num_ready = self._cursor.num_ready
        if num_ready > self._told_ready and self._connection is not None:
            self._source.clock.more(self)
            self._told_ready = num_ready
            self._connection.send(Ready(self.number, num_ready))
        self._request_slot()

    def _let_read(self, connection: Connection, cursor: Cursor) -> bool:
        """Tell the peer of what it may read, and promise to leave it alone. Whether it has heard of all that is ready:
        with checksums, which keep this thread, it hears of one piece a turn of the loop."""
        source, env, told_bytes = self._source, self._source.env, 0
        while cursor.has_next and not self._telling:
            index, piece = cursor.taken, cursor.take()
            crc32 = env.mover.checksum_of(source.block_table, piece) if env.checksum else None
            until_s = time.monotonic() + env.stall_timeout_s
            source.promise(until_s)
            connection.send(Readable(self.number, index, piece, until_s, crc32))
            told_bytes += self._terms.join.nbytes(piece)
            if env.checksum and cursor.has_next:
                self._telling = True
                asyncio.get_running_loop().call_soon(self._tell_more)
        self._readable_bytes += told_bytes
        if source.first_token is not None:
            env.poller.stay_awake(self, plan.reading_s(told_bytes))
        return not cursor.has_next

    def _tell_more(self) -> None:
        self._telling = False
        if self.ended_at_s is not None:
            return
        if self._source.first_token is not None:
            self.complete()
        else:
            self._say_ready()

    def _note_read(self, read_s: float) -> None:
        """The peer has read, for so long, what it was told of."""
        source, nbytes = self._source, self._readable_bytes
        if nbytes:
            source.busy.add(read_s)
            source.sent(nbytes)
            source.counter.payload_took(read_s)
            source.counter.moved(nbytes, transport_to(source.block_table.device))

    def _packed(self, grant: Grant, piece: Piece, slot: Slot, payload: Tensor, error: Exception | None) -> None:
        source, connection = self._source, self._connection
        assert connection is not None, "grants come over a connection"
        if error is not None:
            source.end(TransferError(f"KV could not be packed: {error}", "aborted"))
        if source.ended_at_s is None:
            crc32 = checksum(payload) if source.env.checksum else None
            data = Data(self.number, grant.tag, payload.numel(), piece, crc32, self.outbound.probe(payload))
            source.busy.start()
            connection.send(data)
            connection.send_payload(grant.tag, payload, self).add_done_callback(partial(self._sent, data, slot))
        else:
            self._sending -= 1
            self.outbound.give_back(grant, self)
            source.staging.release(slot)
        source.pack_ended()

    def _sent(self, data: Data, slot: Slot, sent: asyncio.Future[None]) -> None:
        self._source.busy.stop()
        self._sending -= 1
        if self._source.first_token is None and not (self._sending or self.wants_to_send):
            self._source.clock.none_left(self)
        if sent.exception() is None and self._connection is not None:
            self._connection.send(Sent(self.number, data.tag))
            self._source.sent(data.nbytes)
            self._source.counter.moved(data.nbytes, self._connection.transport)
        self._source.staging.release(slot)  # if the connection is lost, it ends all its handoffs itself

    def _expect_no_more(self) -> None:
        if self._expected is not None:
            self._expected.settle()

    def _give_back_grants(self) -> None:
        while self._grants:
            self.outbound.give_back(self._grants.popleft(), self)

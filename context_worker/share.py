"""What one export sends to one rank of the receiver.

Its `Export` and its `ExportLink` call it. Life of an `ExportShare`: offered to the peer, once the link is up → accepted
→ piece by piece: told to be ready, granted by the peer, packed into a buffer, sent → Done from the peer. A peer that
reads the pool itself is told which pieces it may read, and until when, in place of the second part. If its export ends
early, the share ends with it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from context_worker.link import ExportLink
from kv_transfer import pieces
from kv_transfer.connection import Connection, Ticket
from kv_transfer.copies import checksum
from kv_transfer.layout import Span
from kv_transfer.peer_memory import transport_to
from kv_transfer.pieces import Cursor, Piece
from kv_transfer.routes import Terms
from kv_transfer.staging import Buffer
from kv_transfer.wire import Abort, Complete, Data, Grant, Kept, Offer, Readable, Ready, Sent
from pdserve.errors import TransferError

if TYPE_CHECKING:
    from context_worker.handoff import Export

log = logging.getLogger(__name__)


class ExportShare:
    """The part of `export` that one rank of the receiver gets, over `link`. `number` names the handoff on the link."""

    number = -1

    def __init__(self, export: Export, link: ExportLink) -> None:
        self.link = link
        self.done = False
        self.waited_s = 0.0
        self._export = export
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
        return self._export.ended_at_s

    def start(self, connection: Connection, terms: Terms) -> None:
        """The link is up: offer the handoff. `terms` say how its KV travels."""
        export = self._export
        self._connection, self._terms = connection, terms
        connection.send(Offer(self.number, export.key, export.num_tokens, export.tables if terms.reads else ()))
        # From here to Done the peer may not fall silent: neither while it has no blocks yet, nor when all is sent and
        # may lie unread in the network of a frozen process.
        self._expected = connection.expect(self)

    def on_accept(self, first_token: int) -> None:
        """The peer has blocks. It has the first `first_token` tokens already, and needs those from there on."""
        export = self._export
        if self._cursor is not None:
            return
        if not self._terms.may_start_at(first_token, export.num_tokens):
            export.end(TransferError(f"the peer asks for tokens from {first_token} on", "protocol"))
            return
        self._cursor = Cursor(self._terms.wanted(export.num_tokens, first_token))
        if export.first_token is not None:
            self.complete()
            return
        for band, num_tokens in export.computed.bands:
            self._advance(self._cursor, num_tokens, band)
        self._say_ready()

    def advance(self, num_tokens: int, layers: Span) -> None:
        """Note that the first `num_tokens` tokens are computed in `layers` of the model; this share may hold only some
        of these layers, or none."""
        if self._cursor is not None:
            self._advance(self._cursor, num_tokens, layers)
            self._say_ready()

    def _advance(self, cursor: Cursor, num_tokens: int, layers: Span) -> None:
        for number in cursor.groups:
            group = self._terms.groups[number]
            cursor.advance(group.positions(num_tokens, self._export.num_tokens), group.within(layers), number)

    def complete(self) -> None:
        """All KV is computed and the first token is known: tell the peer, once everything ready has been told."""
        connection, cursor, first_token = self._connection, self._cursor, self._export.first_token
        if connection is None or cursor is None or first_token is None:
            return
        cursor.advance_all()
        assert self._export.complete_at_s is not None, "the first token is known"
        self.waited_s = self.waited_s or time.monotonic() - self._export.complete_at_s
        knows_all = True
        if self._terms.reads:
            knows_all = self._let_read(connection, cursor)
        else:
            self._told_ready = cursor.num_ready
            self._request_buffer()  # first, for on a GPU packing goes on meanwhile
        if knows_all:
            connection.send(Complete(self.number, first_token, cursor.num_ready, self.waited_s))
        self._export.clock.more(self)

    def close(self, error: TransferError | None, tell_peer: bool) -> None:
        """The export is over: redeem what was granted, tell the peer if asked to, and leave the link."""
        self._export.staging.withdraw(self)
        self._expect_no_more()
        self._export.env.poller.rest(self)
        if error is not None and tell_peer and self._connection is not None:
            self._connection.send(Abort(self.number, error.reason, error.message))
        self._give_back_grants()
        self.link.remove(self)

    def fail(self, error: TransferError) -> None:
        """The peer has ended the handoff, or is lost."""
        self._export.end(error, heard_from=self)

    def on_done(self, read_s: float) -> None:
        if self._export.first_token is None or self._cursor is None or self.wants_to_send or self._sending:
            self._export.end(TransferError("the peer was done before we were", "protocol"))
        elif not 0 <= read_s < math.inf:
            self._export.end(TransferError(f"the peer says that it has read for {read_s} s", "protocol"))
        elif not self.done:
            self.done = self.link.proven = True
            self._export.clock.none_left(self)
            self._expect_no_more()
            self._note_read(read_s)
            self._export.on_share_done()

    def on_grant(self, grant: Grant) -> None:
        self._grants.append(grant)
        if self.ended_at_s is not None:
            self._give_back_grants()
        elif len(self._grants) > pieces.MAX_IN_FLIGHT:
            self._export.end(TransferError(f"the peer grants more than {pieces.MAX_IN_FLIGHT} messages", "protocol"))
        else:
            self._request_buffer()

    def on_asked(self) -> None:
        """The peer has sent a Ping that names this handoff. If it reads the pool, promise it more time."""
        if self._readable_bytes and self._connection is not None:
            until_s = time.monotonic() + self._export.env.stall_timeout_s
            self._export.promise(until_s)
            self._connection.send(Kept(self.number, until_s))

    @property
    def wants_to_send(self) -> bool:
        """Whether a piece is computed that has been neither sent nor told to be readable."""
        return self._cursor is not None and self._cursor.has_next

    @property
    def wants_turn(self) -> bool:
        return bool(self._grants) and self.wants_to_send

    def take(self, buffer: Buffer) -> None:
        assert self._cursor is not None, "there is something to send"
        export, grant, piece = self._export, self._grants.popleft(), self._cursor.take()
        packing = self._terms.packings[piece.group]
        payload = buffer.memory[: packing.nbytes(piece)]
        export.pack_started()
        self._sending += 1
        try:
            mark = export.env.copier.pack(export.block_tables[piece.group], piece, packing, payload)
            export.env.poller.when(mark, partial(self._packed, grant, piece, buffer, payload), soon=True)
        except Exception as error:
            log.exception("%s: packing failed", export.key)
            self._packed(grant, piece, buffer, payload, error)
        if not self._grants:
            self._say_ready()

    def _request_buffer(self) -> None:
        if self.wants_turn:
            self._export.staging.request(self)

    def _say_ready(self) -> None:
        """Tell the peer of further messages, and send those that it has granted already."""
        assert self._cursor is not None, "the peer has accepted"
        if self._terms.reads and self._connection is not None:
            self._let_read(self._connection, self._cursor)
            return
        num_ready = self._cursor.num_ready
        if num_ready > self._told_ready and self._connection is not None:
            self._export.clock.more(self)
            self._told_ready = num_ready
            self._connection.send(Ready(self.number, num_ready))
        self._request_buffer()

    def _let_read(self, connection: Connection, cursor: Cursor) -> bool:
        """Tell the peer which pieces it may read, and promise to leave their blocks alone.

        Returns whether it has been told of all that is ready. With checksums, which take this thread long, it is told
        of one piece in each turn of the event loop.
        """
        export, env, told_bytes = self._export, self._export.env, 0
        while cursor.has_next and not self._telling:
            index, piece = cursor.taken, cursor.take()
            crc32 = env.copier.checksum_of(export.block_tables[piece.group], piece) if env.config.checksum else None
            until_s = time.monotonic() + env.stall_timeout_s
            export.promise(until_s)
            connection.send(Readable(self.number, index, piece, until_s, crc32))
            told_bytes += self._terms.packings[piece.group].nbytes(piece)
            if env.config.checksum and cursor.has_next:
                self._telling = True
                asyncio.get_running_loop().call_soon(self._tell_more)
        self._readable_bytes += told_bytes
        if export.first_token is not None:
            env.poller.stay_awake(self, pieces.reading_s(told_bytes))
        return not cursor.has_next

    def _tell_more(self) -> None:
        self._telling = False
        if self.ended_at_s is not None:
            return
        if self._export.first_token is not None:
            self.complete()
        else:
            self._say_ready()

    def _note_read(self, read_s: float) -> None:
        """Count what the peer has read, and the `read_s` seconds that it took."""
        export, nbytes = self._export, self._readable_bytes
        if nbytes:
            export.busy.add(read_s)
            export.sent(nbytes)
            export.counter.payload_took(read_s)
            export.counter.moved(nbytes, transport_to(export.env.pool.device))

    def _packed(self, grant: Grant, piece: Piece, buffer: Buffer, payload: Tensor, error: Exception | None) -> None:
        export, connection = self._export, self._connection
        assert connection is not None, "grants come over a connection"
        if error is not None:
            export.end(TransferError(f"KV could not be packed: {error}", "aborted"))
        if export.ended_at_s is None:
            crc32 = checksum(payload) if export.env.config.checksum else None
            data = Data(self.number, grant.tag, payload.numel(), piece, crc32, self.link.probe(payload))
            export.busy.start()
            connection.send(data)
            connection.send_payload(grant.tag, payload, self).add_done_callback(partial(self._sent, data, buffer))
        else:
            self._sending -= 1
            self.link.give_back(grant, self)
            export.staging.release(buffer)
        export.pack_ended()

    def _sent(self, data: Data, buffer: Buffer, sent: asyncio.Future[None]) -> None:
        self._export.busy.stop()
        self._sending -= 1
        if self._export.first_token is None and not (self._sending or self.wants_to_send):
            self._export.clock.none_left(self)
        if sent.exception() is None and self._connection is not None:
            self._connection.send(Sent(self.number, data.tag))
            self._export.sent(data.nbytes)
            self._export.counter.moved(data.nbytes, self._connection.transport)
        self._export.staging.release(buffer)  # if the connection is lost, it ends all its handoffs itself

    def _expect_no_more(self) -> None:
        if self._expected is not None:
            self._expected.settle()

    def _give_back_grants(self) -> None:
        while self._grants:
            self.link.give_back(self._grants.popleft(), self)

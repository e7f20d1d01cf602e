"""What one import gets of one rank of the sender in messages: grants buffers, and unpacks what comes into the blocks.

Life of a `StagedShare`: offered → started, once the import is accepted into blocks → message by message: granted,
received into staging, unpacked → nothing is missing. If its import ends early, the share ends with it. A message that
comes after that stays in staging: its buffer is held until the payload has come, or the connection is closed.

A message counts when it is unpacked and the sender has confirmed, by `Sent`, that its buffer did not change while it
was being sent. It is unpacked before the confirmation: the blocks belong to this import alone, so wrong bytes harm
nobody.

A buffer is granted for each message that the sender says is ready. While buffers are to spare, they are also granted
ahead, for as many messages as will come in any case; then KV leaves the sender as soon as it is computed.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from generation_worker.link import ImportLink
from generation_worker.share import ImportShare
from kv_transfer import pieces
from kv_transfer.connection import Ticket
from kv_transfer.copies import checksum
from kv_transfer.staging import Buffer
from kv_transfer.wire import Abort, Complete, Data, Done, Grant, Offer
from pdserve.errors import TransferError

if TYPE_CHECKING:
    from generation_worker.handoff import Import

log = logging.getLogger(__name__)

WRONG_DATA = (
    "the first KV over {} is not what was sent; if GPUs of this host can't reach each other's memory, "
    "UCX_TLS=^cuda_ipc in the environment of both workers keeps KV off that way"
)


@dataclass(eq=False, slots=True)
class _Receipt:
    """A message that was granted `buffer`: on its way into it, or from there into the blocks. It counts once it is
    `unpacked` and `sent` was confirmed."""

    tag: int
    buffer: Buffer
    ticket: Ticket
    received_bytes: int | None = None
    data: Data | None = None
    sent: bool = False
    unpacking: bool = False
    unpacked: bool = False


class StagedShare(ImportShare):
    """The part of an import that one rank of the sender has, in messages over `link`."""

    def __init__(self, handoff: Import, link: ImportLink, offer: Offer) -> None:
        super().__init__(handoff, link, offer)
        self._granted = 0
        self._announced = 0
        self._travelled = 0
        self._sure_messages = self._max_messages = 0
        self._ready_messages = 0
        self._receipts: dict[int, _Receipt] = {}

    def start(self, num_cached_tokens: int) -> None:
        """The import has blocks, with the first `num_cached_tokens` tokens in them: accept, and grant buffers."""
        self._want_from(num_cached_tokens)
        self._sure_messages = sum(wanted.num_messages for wanted in self._wanted.values())
        self._max_messages = self._missing_cells or 0
        self._accept()
        self._ask_for_buffers()

    def on_ready(self, num_messages: int) -> None:
        if not self._is_expected("KV"):
            return
        if num_messages > self._max_messages:
            self._refuse(f"{num_messages} messages are ready, and there are {self._max_messages} cells")
        elif num_messages > self._ready_messages:
            self._ready_messages = num_messages
            self._import.clock.more(self)
        self._ask_for_buffers()
        self._clock()

    def on_complete(self, complete: Complete) -> None:
        self.on_ready(complete.num_messages)
        self._expect_no_more()
        super().on_complete(complete)

    def on_data(self, data: Data) -> None:
        receipt = self._receipts.get(data.tag)
        if receipt is not None and receipt.data is None:
            receipt.data = data
            self._announced += 1
            self._clock()
            self._settle(receipt)

    def on_sent(self, tag: int) -> None:
        """The sender confirms that its buffer did not change before the payload had left it."""
        receipt = self._receipts.get(tag)
        if receipt is not None and not receipt.sent:
            receipt.sent = True
            self._note_travel(receipt)
            self._count(receipt)

    @property
    def wants_turn(self) -> bool:
        return self._granted < self._ready_messages and self._may_grant

    def take(self, buffer: Buffer) -> None:
        """Post a receive into `buffer`, then tell the sender its tag."""
        connection = self.link.connection
        receipt = _Receipt(self.link.next_tag(), buffer, connection.expect(self))
        self._receipts[receipt.tag] = receipt
        self._granted += 1
        self._clock()
        future = connection.recv_payload(receipt.tag, buffer.memory[: self.link.terms.max_bytes])
        future.add_done_callback(partial(self._on_received, receipt))
        connection.send(Grant(self.number, receipt.tag))

    def close(self, error: TransferError | None, tell_peer: bool) -> None:
        """The import is over: tell the sender if asked to, and release the buffers whose payload has come."""
        self._import.staging.withdraw(self)
        if error is None:
            self.link.connection.send(Done(self.number))
        elif tell_peer:
            self.link.connection.send(Abort(self.number, error.reason, error.message))
        self._expect_no_more()
        self.link.remove(self)
        for receipt in list(self._receipts.values()):
            self._settle(receipt)
        self._clock()

    def _on_received(self, receipt: _Receipt, future: asyncio.Future[int]) -> None:
        if future.exception() is not None:
            self._close(receipt)
            self._import.staging.release(receipt.buffer)
            return
        receipt.received_bytes = future.result()
        self._note_travel(receipt)
        self._settle(receipt)

    @property
    def _may_grant(self) -> bool:
        has_room = len(self._receipts) < pieces.MAX_IN_FLIGHT
        return self._missing_cells is not None and has_room and self.ended_at_s is None

    def _ask_for_buffers(self) -> None:
        if self.wants_turn:
            self._import.staging.request(self)
        while self._granted < self._sure_messages and self._may_grant:
            buffer = self._import.staging.take_spare()
            if buffer is None:
                return
            self.take(buffer)

    def _settle(self, receipt: _Receipt) -> None:
        """Deal with a message whose payload has come: unpack it, or let its buffer go."""
        data = receipt.data
        if receipt.received_bytes is None or receipt.unpacking:
            return
        if self.ended_at_s is not None:
            self._close(receipt)
            if not receipt.unpacked:
                self._import.staging.release(receipt.buffer)
            return
        if data is None or receipt.unpacked:
            return
        payload = receipt.buffer.memory[: data.nbytes]
        if not self._is_sound(data, receipt.received_bytes):
            what = f"{data.piece} in {data.nbytes} bytes came as {receipt.received_bytes} bytes"
            self._import.end(TransferError(f"a message does not hold what it should: {what}", "protocol"))
        elif data.crc32 is not None and checksum(payload) != data.crc32:
            self._import.end(TransferError(f"the checksum of {data.piece} does not match", "checksum"))
        elif data.probe is not None and self._import.env.copier.probe(payload) != data.probe:
            self._import.end(TransferError(WRONG_DATA.format(self.link.connection.transport), "checksum"))
        else:
            self._unpack(receipt, data, payload)

    def _is_sound(self, data: Data, received_bytes: int) -> bool:
        """Whether the message is whole, and a missing piece that has not come before."""
        if data.piece is None or received_bytes < data.nbytes:
            return False
        return self._claim(data.piece) and self.link.terms.packings[data.piece.group].nbytes(data.piece) == data.nbytes

    def _note_travel(self, receipt: _Receipt) -> None:
        if receipt.sent and receipt.received_bytes is not None:
            self._travelled += 1
            self._clock()

    def _clock(self) -> None:
        """Count time as transfer time while a message is due. Waiting for KV that is still computed does not count."""
        due = max(self._announced, min(self._granted, self._ready_messages))
        self._count_time(self.ended_at_s is None and self._travelled < due)
        if not self.complete and self._travelled >= max(self._announced, self._ready_messages):
            self._import.clock.none_left(self)

    def _close(self, receipt: _Receipt) -> None:
        del self._receipts[receipt.tag]
        receipt.ticket.settle()

    def _unpack(self, receipt: _Receipt, data: Data, payload: Tensor) -> None:
        handoff, copier = self._import, self._import.env.copier
        assert data.piece is not None, "a sound message names its piece"
        piece, packing = data.piece, self.link.terms.packings[data.piece.group]
        receipt.unpacking = True
        handoff.unpack_started()
        try:
            mark = copier.unpack(payload, handoff.block_tables[piece.group], piece, packing, handoff.mark)
            handoff.env.poller.when(mark, partial(self._unpacked, receipt), soon=True)
        except Exception as error:
            log.exception("%s: unpacking failed", handoff.key)
            self._unpacked(receipt, error)

    def _unpacked(self, receipt: _Receipt, error: Exception | None) -> None:
        receipt.unpacking, receipt.unpacked = False, True
        self._import.staging.release(receipt.buffer)
        if error is not None:
            self._import.end(TransferError(f"KV could not be unpacked: {error}", "aborted"))
        if self.ended_at_s is None:
            self._count(receipt)
        elif receipt.tag in self._receipts:
            self._close(receipt)
        self._import.unpack_ended()

    def _count(self, receipt: _Receipt) -> None:
        """Count a message if it is in the blocks and confirmed."""
        data = receipt.data
        if not (receipt.sent and receipt.unpacked) or data is None or data.piece is None or self._missing_cells is None:
            return
        self._close(receipt)
        self._missing_cells -= data.piece.cells
        if self.landed:
            self._import.clock.none_left(self)
        self.link.counter.moved(data.nbytes, self.link.connection.transport)
        self._ask_for_buffers()
        self._import.landed(data.nbytes)

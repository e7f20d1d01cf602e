"""What one import reads out of the pool of one sender rank, without staging. The other way is `staged_share`.

Life of a `DirectShare`: offered → started, once the import is accepted into blocks → piece by piece: readable, then
read, in turn with other handoffs → nothing is missing. If its import ends early, the share ends with it.

The sender promises that a piece stays as it is until a moment on the host's clock, which both processes read. What was
read by then is right, even if the sender has died. What was read later is not used. A reader that needs longer sends a
Ping that names the handoff, and the sender extends its promise (`Kept`); nothing else is said in between. The blocks
that are read into belong to this import until its event, which waits for every read.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from generation_worker.link import ImportLink
from generation_worker.readable_pool import ReadablePool
from generation_worker.share import ImportShare
from kv_transfer import pieces
from kv_transfer.copies import Destination
from kv_transfer.layout import Span
from kv_transfer.mark_poller import Mark
from kv_transfer.pieces import Piece
from kv_transfer.wire import Abort, Done, Kept, Offer, Readable
from pdserve.errors import TransferError

if TYPE_CHECKING:
    from generation_worker.handoff import Import

log = logging.getLogger(__name__)

ANSWER_S = 0.0001
"""How soon after the Accept a sender that has computed something says what can be read, in seconds."""

ANSWER_LATE_S = 0.0003
"""How much later than `ANSWER_S` that may be, in seconds."""


class DirectShare(ImportShare):
    """The part of an import that one rank of the sender has, read out of the blocks of `source` that `offer` names."""

    def __init__(self, handoff: Import, link: ImportLink, offer: Offer, source: ReadablePool) -> None:
        super().__init__(handoff, link, offer)
        self._source = source
        self._source_tables = [handoff.env.copier.block_table(table) for table in offer.tables]
        self._num_readable = 0
        self._waiting: deque[Readable] = deque()
        self._reading = 0
        self._read_cells = 0
        self._kept_until_s = 0.0

    def start(self, num_cached_tokens: int) -> None:
        """The import has blocks, with the first `num_cached_tokens` tokens in them: accept."""
        self._want_from(num_cached_tokens)
        self._rehearse()
        if self.ended_at_s is None:
            self._accept()
            self._import.env.poller.stay_awake(self, ANSWER_S, late_s=ANSWER_LATE_S)

    def on_readable(self, readable: Readable) -> None:
        if 0 <= readable.index < self._num_readable or not self._is_expected("KV"):
            return  # said twice, or too soon
        in_order = readable.index == self._num_readable and math.isfinite(readable.until_s)
        if not in_order or not self._claim(readable.piece):
            what = f"{readable.piece}, number {readable.index}, until {readable.until_s}"
            self._refuse(f"what may be read is not what is missing: {what}, after {self._num_readable} pieces")
            return
        self._num_readable += 1
        self._import.env.poller.rest(self)
        self._waiting.append(readable)
        self._clock()
        self._import.reads.request(self)
        if self._waiting or self._reading:
            self._import.clock.more(self)

    def on_kept(self, kept: Kept) -> None:
        if not math.isfinite(kept.until_s):
            self._refuse(f"blocks can't be kept until {kept.until_s}")
        self._kept_until_s = max(self._kept_until_s, kept.until_s)

    @property
    def wants_turn(self) -> bool:
        return bool(self._waiting)

    def take(self, turn: int) -> None:
        """Read the next piece. `turn` is held until it is read."""
        self._read(self._waiting.popleft(), turn, self._import.mark)

    def close(self, error: TransferError | None, tell_peer: bool) -> None:
        """The import is over: tell the sender if asked to. Reads that run are not counted any more."""
        if error is None:
            self.link.connection.send(Done(self.number, self._import.busy.seconds))
        elif tell_peer:
            self.link.connection.send(Abort(self.number, error.reason, error.message))
        self._import.reads.withdraw(self)
        self._expect_no_more()
        self._waiting.clear()
        self._clock()
        self._import.env.poller.rest(self)
        self.link.remove(self)

    def _rehearse(self) -> None:
        """Read an empty piece, just before the sender may answer: the first read after this thread has slept takes
        three to ten times as long. It waits for no mark, since the reads of other handoffs would wait behind it."""
        turn = self._import.reads.take_spare()
        if turn is not None:
            nothing = Piece(Span(0, 0), Span(0, 0), next(iter(self._wanted)))
            self._read(Readable(self.number, -1, nothing, math.inf), turn, after=None)

    def _read(self, readable: Readable, turn: int, after: Mark) -> None:
        handoff, piece, env = self._import, readable.piece, self._import.env
        self._reading += 1
        self._read_cells += piece.cells
        is_last = self._read_cells == self._missing_cells
        self._source.hold()
        handoff.unpack_started()
        try:
            source = self._source.groups[piece.group]
            destination = Destination(handoff.block_tables[piece.group], piece, after)
            mark = env.copier.read(source.reader, self._source_tables[piece.group], source.layers, destination)
            env.poller.when(mark, partial(self._was_read, readable, turn), soon=is_last)
            if is_last:
                env.poller.stay_awake(turn, pieces.reading_s(self.link.terms.packings[piece.group].nbytes(piece)))
        except Exception as error:
            log.exception("%s: reading failed", handoff.key)
            self._was_read(readable, turn, error)

    def _was_read(self, readable: Readable, turn: int, error: Exception | None) -> None:
        handoff, piece = self._import, readable.piece
        self._reading -= 1
        self._read_cells -= piece.cells
        if self.ended_at_s is None:
            fault = self._fault_of(readable, error)
            if fault is None:
                self._land(piece)
            else:
                handoff.end(fault)
        self._source.let_go()
        handoff.env.poller.rest(turn)
        handoff.reads.release(turn)  # only now, for the sender waits to hear that we are done
        handoff.unpack_ended()

    def _fault_of(self, readable: Readable, error: Exception | None) -> TransferError | None:
        """Why the piece that was just read must not be used; None if it may."""
        piece = readable.piece
        if error is not None:
            return TransferError(f"KV could not be read: {error}", "aborted")
        if time.monotonic() >= max(readable.until_s, self._kept_until_s):
            return TransferError(f"{piece} was read too late: its blocks may hold something else by now", "timeout")
        if not self._is_whole(readable):
            return TransferError(f"the checksum of {piece} does not match", "checksum")
        return None

    def _land(self, piece: Piece) -> None:
        assert self._missing_cells is not None, "what was read was wanted"
        self._missing_cells -= piece.cells
        self._clock()
        nbytes = self.link.terms.packings[piece.group].nbytes(piece)
        self._import.landed(nbytes)  # first, for the sender waits to hear that we are done
        self.link.counter.moved(nbytes, self._source.transport)

    def _is_whole(self, readable: Readable) -> bool:
        handoff, piece = self._import, readable.piece
        if readable.crc32 is None:
            return True
        return handoff.env.copier.checksum_of(handoff.block_tables[piece.group], piece) == readable.crc32

    def _clock(self) -> None:
        """Count time as transfer time while a piece can be read, or is being read."""
        is_reading = bool(self._waiting or self._reading)
        self._count_time(self.ended_at_s is None and is_reading)
        if self.landed or not (is_reading or self.complete):
            self._import.clock.none_left(self)

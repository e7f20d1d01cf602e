"""What an import gets of one rank of the sender. `staged_share` gets it in messages, `direct_share` reads the pool.

This base of both owns what is wanted, what is still missing, and the time in which something was on its way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from generation_worker.link import ImportLink
from kv_transfer.connection import Ticket
from kv_transfer.pieces import Coverage, Piece, Wanted
from kv_transfer.wire import Accept, Complete, Data, Kept, Offer, Readable
from pdserve.errors import TransferError

if TYPE_CHECKING:
    from generation_worker.handoff import Import


class ImportShare:
    """The part of an import that one rank of the sender has, over `link`.

    `complete`: that rank has computed all of it and knows the first token.
    """

    def __init__(self, handoff: Import, link: ImportLink, offer: Offer) -> None:
        self.number = offer.handoff
        self.link = link
        self.complete = False
        self._import = handoff
        self._num_tokens = offer.num_tokens
        self._first_token = 0
        self._wanted: dict[int, Wanted] = {}
        self._coverage: dict[int, Coverage] = {}
        self._missing_cells: int | None = None
        self._heard_since_accepted = False
        self._under_way = False
        self._expected: Ticket | None = None

    @property
    def ended_at_s(self) -> float | None:
        return self._import.ended_at_s

    @property
    def landed(self) -> bool:
        """Whether all of it is in its blocks."""
        return self._missing_cells == 0

    # The messages of the other way of transfer are ignored: a share that reads gets no Data, one in messages no
    # Readable.

    def on_ready(self, num_messages: int) -> None: ...

    def on_data(self, data: Data) -> None: ...

    def on_sent(self, tag: int) -> None: ...

    def on_readable(self, readable: Readable) -> None: ...

    def on_kept(self, kept: Kept) -> None: ...

    def on_asked(self) -> None:
        """The sender has sent a Ping that names this handoff. If nothing has come from it since we accepted, it may not
        have got the Accept: say it again."""
        if self._missing_cells is not None and not self._heard_since_accepted:
            self._say_accepted()

    def on_complete(self, complete: Complete) -> None:
        """The sender has computed all of its share, and knows the first token."""
        if not 0 <= complete.waited_s < math.inf:
            self._refuse(f"a sender says that it has waited for {complete.waited_s} s")
        elif self._is_expected("all") and not self.complete:
            self.complete = True
            if not self.landed:
                self._import.clock.more(self)
            self._import.on_complete(complete.first_token, complete.waited_s)

    def fail(self, error: TransferError) -> None:
        """The peer has ended the handoff, or is lost."""
        self._import.end(error, heard_from=self)

    def _accept(self) -> None:
        """Tell the sender that there are blocks. From now on it must not fall silent, until `_expect_no_more`."""
        self._say_accepted()
        self._expected = self.link.connection.expect(self)

    def _say_accepted(self) -> None:
        self.link.connection.send(Accept(self.number, self._first_token))

    def _is_expected(self, what: str) -> bool:
        """Whether the sender may speak of `what` now: only after we have accepted. If not, the import ends."""
        if self._missing_cells is None:
            self._refuse(f"{what} came before it was accepted")
            return False
        self._heard_since_accepted = True
        return True

    def _refuse(self, what: str) -> None:
        """The sender has broken the protocol: end the import."""
        self._import.end(TransferError(what, "protocol"))

    def _expect_no_more(self) -> None:
        """The sender need not say anything more: it may fall silent."""
        if self._expected is not None:
            self._expected.settle()

    def _want_from(self, num_cached_tokens: int) -> None:
        """Want all tokens but the first `num_cached_tokens`, which are in the blocks already."""
        self._first_token = num_cached_tokens
        for wanted in self.link.terms.wanted(self._num_tokens, num_cached_tokens):
            self._wanted[wanted.piece.group] = wanted
            self._coverage[wanted.piece.group] = Coverage(wanted.piece)
        self._missing_cells = sum(wanted.piece.cells for wanted in self._wanted.values())

    def _claim(self, piece: Piece) -> bool:
        """Whether `piece` lies within what is wanted, is cut where a sender may cut, and nothing of it has come before.
        It counts as come from now on."""
        wanted = self._wanted.get(piece.group)
        return wanted is not None and wanted.may_hold(piece) and self._coverage[piece.group].claim(piece)

    def _count_time(self, under_way: bool) -> None:
        """Count time as transfer time from now on, or no longer."""
        if under_way != self._under_way:
            self._under_way = under_way
            (self.link.counter.payload_started if under_way else self.link.counter.payload_ended)()
            (self._import.busy.start if under_way else self._import.busy.stop)()

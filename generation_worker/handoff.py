"""One handoff on its way into this rank, from every rank of the sender that holds layers and heads of this one.

`Imports` makes it. Life of an `Import`: offered by the first sender rank → accepted into blocks → received, share by
share → complete, when every layer and head of this rank has landed and the first token is known. An abort, its clock, a
sender's withdrawal or the loss of a link ends it early, and all its shares with it.

An import posts exactly one event, when nothing writes to its blocks any more. On a follower it may be accepted before
it is offered. An offer may wait for its acceptance as long as both sides want it. Once the import is accepted, the
other ranks of the sender must offer their shares within the clock's limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from generation_worker.direct_share import DirectShare
from generation_worker.link import ImportLink
from generation_worker.staged_share import StagedShare
from kv_transfer.counters import BusyClock, PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.layout import Tables
from kv_transfer.mark_poller import Mark, is_reached
from kv_transfer.ranks.calls import Accept
from kv_transfer.routes import overlap
from kv_transfer.staging import Staging
from kv_transfer.transfer_clock import TransferClock
from kv_transfer.turns import Turns
from kv_transfer.wire import Offer
from pdserve.errors import TransferError
from pdserve.handoff import HandoffCost, HandoffEvent, ImportDone, ImportFailed
from pdserve.protocol import Key


class Import:
    """See the module.

    Args:
        staging: where messages land.
        reads: turns for reading other pools.
        on_end: called as soon as the import is over; its event may follow a moment later.
    """

    def __init__(
        self, env: Environment, staging: Staging, reads: Turns[int], key: Key, on_end: Callable[[Import], None]
    ) -> None:
        self.key = key
        self.env = env
        self.staging = staging
        self.reads = reads
        self.accepted = False
        self.block_tables: list[Tensor] = []
        self.mark: Mark = None
        self.ended_at_s: float | None = None
        self.busy = BusyClock()
        self._on_end = on_end
        self._since_s = time.monotonic()
        self._complete_at_s: float | None = None
        self._waited_s = 0.0
        self._nbytes = 0
        self._num_tokens: int | None = None
        self._num_cached_tokens = 0
        self._tables: Tables = ()
        self._shares: list[StagedShare | DirectShare] = []
        self._first_token: int | None = None
        self._counter: PeerCounter | None = None
        self._unpacking = 0
        self._event: HandoffEvent | None = None
        self.clock = TransferClock(env.timeout_s, self.end)

    def refusal(self, offer: Offer, link: ImportLink) -> str | None:
        """Why `offer`, of a further rank of the sender, does not belong to this import; None if it does."""
        for share in self._shares:
            if share.link.worker_id != link.worker_id:
                return f"{self.key} is offered by {share.link.worker_id} already"
            if overlap(share.link.terms.shares, link.terms.shares):
                return f"{self.key}: these layers and heads are offered already"
        if self._num_tokens not in (None, offer.num_tokens):
            return f"{self.key} has {self._num_tokens} tokens, not {offer.num_tokens}"
        return None

    def add(self, offer: Offer, link: ImportLink) -> None:
        """Add the share that a rank of the sender offers, and start it if the import is accepted already."""
        if self._counter is None:
            self._counter = link.counter
            self._counter.handoff_started()
        source = link.source
        share = StagedShare(self, link, offer) if source is None else DirectShare(self, link, offer, source)
        self._shares.append(share)
        link.add(share)
        first, self._num_tokens = self._num_tokens is None, offer.num_tokens
        if not self.accepted:
            return
        if first:
            self._check_blocks(offer.num_tokens)
        if self.ended_at_s is None:
            share.start(self._num_cached_tokens)
        self._watch_offers()

    def accept(self, call: Accept, mark: Mark) -> None:
        """Start all shares. `call` names the blocks to write to. Nothing is written to them before `mark`, a point on
        the engine's stream: steps enqueued before it may still read them."""
        if self.accepted:
            return
        self.accepted = True
        self._tables, self._num_cached_tokens = call.tables, call.num_cached_tokens
        self.mark = None if is_reached(mark) else mark
        self.block_tables = [self.env.copier.block_table(table) for table in call.tables]
        if self._num_tokens is not None:
            self._check_blocks(self._num_tokens)
        for share in self._shares:
            if self.ended_at_s is None:
                share.start(call.num_cached_tokens)
        self._watch_offers()
        self._finish_if_complete()

    def on_complete(self, first_token: int, waited_s: float) -> None:
        """A rank of the sender has computed all of its share. When we accepted, it had been waiting with that for
        `waited_s` seconds."""
        if self._complete_at_s is None:
            self._complete_at_s = time.monotonic()
        self._waited_s = max(self._waited_s, waited_s)
        if self._first_token not in (None, first_token):
            self.end(TransferError(f"ranks of the sender sampled {self._first_token} and {first_token}", "protocol"))
        self._first_token = first_token
        self._finish_if_complete()

    def landed(self, nbytes: int) -> None:
        """`nbytes` more are in their blocks, and known to be right."""
        self._nbytes += nbytes
        self._finish_if_complete()

    def unpack_started(self) -> None:
        self._unpacking += 1

    def unpack_ended(self) -> None:
        self._unpacking -= 1
        self._finish_if_complete()
        self._post_if_quiet()

    def end(self, error: TransferError | None, heard_from: object = None, silent: bool = False) -> None:
        """End the import and its shares: with success if `error` is None. Every sender rank is told the error, except
        the one that reported it (`heard_from`). The event follows once nothing writes to the blocks; with `silent`
        there is none for an error."""
        if self.ended_at_s is not None:
            return
        self.ended_at_s = time.monotonic()
        self.clock.stop()
        for share in self._shares:
            share.close(error, tell_peer=share is not heard_from)  # first, for the sender waits
        if self._counter is not None:
            self._counter.handoff_ended(error.reason if error else None)
        self._on_end(self)
        if error is not None and not silent:
            self._event = ImportFailed(self.key, error)
        elif error is None:
            assert self._first_token is not None, "a handoff is complete with its first token"
            self._event = ImportDone(self.key, self._first_token, self._cost(self.ended_at_s))
        self._post_if_quiet()

    def _cost(self, ended_at_s: float) -> HandoffCost:
        complete_at_s = ended_at_s if self._complete_at_s is None else self._complete_at_s
        return HandoffCost(
            self._shares[0].link.worker_id,
            self._nbytes,
            seconds=ended_at_s - self._since_s,
            busy_s=self.busy.seconds,
            exposed_s=self._waited_s + ended_at_s - complete_at_s,
            waited_s=self._waited_s,
            moving_s=0.0 if self.busy.began_s is None else ended_at_s - self.busy.began_s,
        )

    def _watch_offers(self) -> None:
        """Let the clock run while the import is accepted and part of this rank's layers and heads is not offered."""
        offered = sum(share.link.terms.num_pairs for share in self._shares)
        if offered < self.env.pool.num_pairs:
            self.clock.more(self)
        else:
            self.clock.none_left(self)

    def _check_blocks(self, num_tokens: int) -> None:
        cached, groups = self._num_cached_tokens, self.env.pool.layout.groups
        fits = cached <= num_tokens and len(self._tables) == len(groups)
        for table, group in zip(self._tables, groups, strict=False):
            fits = fits and group.is_named(table, num_tokens)
            fits = fits and (group.kind == "state" or cached % group.tokens_per_block == 0)
        if not fits:
            what = f"{[len(table) for table in self._tables]} blocks, {cached} tokens cached"
            self.end(TransferError(f"{num_tokens} tokens can't be accepted into {what}", "protocol"))

    def _finish_if_complete(self) -> None:
        if not self.accepted or self._first_token is None or self.ended_at_s is not None:
            return
        # All of a share may land, some layers at a time, before its sender rank knows the first token.
        landed = sum(share.link.terms.num_pairs for share in self._shares if share.landed and share.complete)
        if landed == self.env.pool.num_pairs:
            self.end(None)

    def _post_if_quiet(self) -> None:
        if self._event is not None and self._unpacking == 0:
            event, self._event = self._event, None
            self.env.post(event)

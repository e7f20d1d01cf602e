"""One handoff on its way out of this rank, to every receiver rank that shares layers and heads with it.

`Exports` makes it. Life of an `Export`: offered → computed, while its shares send → every share is Done. An abort, its
clock, a peer's refusal or the loss of a link ends it early, and all its shares with it.

An export posts exactly one event, and not before its blocks may be reused: no pack reads them any more, and no peer may
still read them under a promise. A peer that has said Done reads no more. Where no receiver needs anything of this rank,
because another rank holds the same, the export is done with the first token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from context_worker.link import ExportLink
from context_worker.share import ExportShare
from kv_transfer.counters import BusyClock, PeerCounter
from kv_transfer.environment import Environment
from kv_transfer.layout import Span
from kv_transfer.pieces import Frontier
from kv_transfer.ranks.calls import Offer
from kv_transfer.staging import Staging
from kv_transfer.transfer_clock import TransferClock
from pdserve.errors import TransferError
from pdserve.handoff import ExportDone, ExportFailed, HandoffCost, HandoffEvent


class Export:
    """The handoff that `offer` asks for: the KV of its tokens, in the blocks of its tables.

    Args:
        staging: where messages are packed.
        counter: counts what goes to this peer.
        on_posted: called right before the event is posted.
    """

    def __init__(
        self,
        env: Environment,
        staging: Staging,
        offer: Offer,
        counter: PeerCounter,
        on_posted: Callable[[Export], None],
    ) -> None:
        for table, group in zip(offer.tables, env.pool.layout.groups, strict=True):
            assert group.is_named(table, offer.num_tokens), f"{offer.key}: fewer blocks than its tokens take"
        self.key = offer.key
        self.num_tokens = offer.num_tokens
        self.tables = offer.tables
        self.env = env
        self.staging = staging
        self.counter = counter
        self.computed = Frontier(env.pool.layers)
        self.block_tables = [env.copier.block_table(table) for table in offer.tables]
        self.first_token: int | None = None
        self._expected_token: int | None = None
        self.complete_at_s: float | None = None
        self.ended_at_s: float | None = None
        self.busy = BusyClock()
        self._on_posted = on_posted
        self._offered_at_s = time.monotonic()
        self._nbytes = 0
        self._shares: list[ExportShare] = []
        self._packing = 0
        self._moving_from_s: float | None = None
        self._promised_until_s = 0.0
        self._event: HandoffEvent | None = None
        self.clock = TransferClock(env.timeout_s, self.end)
        counter.handoff_started()

    def offer_over(self, links: Sequence[ExportLink]) -> None:
        """Offer a share over each of `links`. Called once."""
        self._shares = [ExportShare(self, link) for link in links]
        for share in self._shares:
            share.link.add(share)

    def advance(self, num_tokens: int, layers: Span | None) -> None:
        """Note that the first `num_tokens` tokens are computed in `layers` of the model; None: in all that this rank
        holds."""
        num_tokens = min(num_tokens, self.num_tokens)
        layers = self.computed.layers if layers is None else layers
        if self.ended_at_s is not None or num_tokens <= self.computed.reached(layers):
            return
        self.computed.advance(num_tokens, layers)
        for share in self._shares:
            share.advance(num_tokens, layers)
        self._complete_if_computed()

    def expect(self, first_token: int) -> None:
        """Note that `first_token` is sampled. The export is complete as soon as all KV is known to be computed."""
        self._expected_token = first_token
        self._complete_if_computed()

    def complete(self, first_token: int) -> None:
        """Note that all KV is computed and `first_token` is sampled. May be called twice."""
        if self.ended_at_s is not None or self.first_token is not None:
            return
        self.computed.advance(self.num_tokens, self.computed.layers)
        self.first_token = first_token
        self.complete_at_s = time.monotonic()
        for share in self._shares:
            share.complete()
        self.on_share_done()

    def _complete_if_computed(self) -> None:
        all_computed = self.computed.reached(self.computed.layers) >= self.num_tokens
        if all_computed and self._expected_token is not None:
            self.complete(self._expected_token)

    def pack_started(self) -> None:
        self._packing += 1
        if self._moving_from_s is None:
            self._moving_from_s = time.monotonic()

    def promise(self, until_s: float) -> None:
        """A peer was promised that the blocks stay as they are until `until_s`."""
        self._promised_until_s = until_s
        if self._moving_from_s is None:
            self._moving_from_s = time.monotonic()

    def pack_ended(self) -> None:
        self._packing -= 1
        self._post_if_quiet()

    def sent(self, nbytes: int) -> None:
        self._nbytes += nbytes

    def on_share_done(self) -> None:
        if self.first_token is not None and all(share.done for share in self._shares):
            self.end(None)

    def end(self, error: TransferError | None, heard_from: ExportShare | None = None) -> None:
        """End the export and its shares: with success if `error` is None. Every peer is told the error, except the one
        that reported it (`heard_from`). The event follows once nothing reads the blocks."""
        if self.ended_at_s is not None:
            return
        self.ended_at_s = time.monotonic()
        self.clock.stop()
        self.counter.handoff_ended(error.reason if error else None)
        for share in self._shares:
            share.close(error, tell_peer=share is not heard_from and not share.done)
        self._event = ExportFailed(self.key, error) if error else ExportDone(self.key, self._cost(self.ended_at_s))
        self._post_if_quiet()

    def _cost(self, ended_at_s: float) -> HandoffCost:
        assert self.complete_at_s is not None, "an export is done after its first token"
        return HandoffCost(
            self.counter.peer,
            self._nbytes,
            seconds=ended_at_s - self._offered_at_s,
            busy_s=self.busy.seconds,
            exposed_s=ended_at_s - self.complete_at_s,
            waited_s=max((share.waited_s for share in self._shares), default=0.0),
            moving_s=0.0 if self._moving_from_s is None else ended_at_s - self._moving_from_s,
        )

    def _post_if_quiet(self) -> None:
        if self._event is None or self._packing:
            return
        promised_s = self._promised_until_s - time.monotonic()
        if isinstance(self._event, ExportFailed) and promised_s > 0:
            asyncio.get_running_loop().call_later(promised_s, self._post_if_quiet)
            return
        event, self._event = self._event, None
        self._on_posted(self)
        self.env.post(event)

"""All exports of one rank, by key, and the links to the receivers that it has sent to.

The transceiver calls `Exports`. It owns the two tables; one handoff is `handoff.Export`, its part for one rank of the
receiver `share.ExportShare`, the link to that rank `link.ExportLink`. `kv_transfer.routes` computes from the layouts of
all ranks on both sides which ranks of a receiver get what of this rank.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import msgspec

from context_worker.handoff import Export
from context_worker.link import ExportLink, ReceiverRank
from kv_transfer.environment import Environment
from kv_transfer.layout import KvLayout
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import AbortExport, Call, Computed, Finish, Offer, reason_of
from kv_transfer.routes import routes
from kv_transfer.staging import Staging
from pdserve import protocol
from pdserve.errors import MalformedMessage, TransferError
from pdserve.protocol import Key, KvAddress, KvRank

_layout_decoder: msgspec.json.Decoder[KvLayout] = msgspec.json.Decoder(KvLayout)


MAX_PEERS = 128
"""The most peers to stay connected to. A link to one of their ranks takes some MB and a dozen descriptors."""


class Exports:
    """The sending `Half` of a transceiver; its methods are described there."""

    unpacks = False

    def __init__(self) -> None:
        self._exports: dict[Key, Export] = {}
        self._all_posted = asyncio.Event()
        self._peers: OrderedDict[KvAddress, list[ExportLink]] = OrderedDict()

    async def open(self, env: Environment, staging: Staging) -> int:
        """As `Half.open`; it does not listen."""
        self._env = env
        self._staging = staging
        self._ranks: Sequence[KvLayout] = (env.pool.layout,)
        self._rank = 0
        return 0

    def meet(self, ranks: Sequence[KvRank], rank: int) -> None:
        self._ranks, self._rank = [_layout_decoder.decode(each.layout) for each in ranks], rank

    def run(self, call: Call, mark: Mark) -> None:
        """As `Half.run`."""
        if isinstance(call, Computed | Finish):
            if isinstance(call, Finish) and (export := self._exports.get(call.key)) is not None:
                # The mark is where the engine's stream is now, perhaps behind a later step. The marks of the layers,
                # taken as they were launched, may be reached sooner: then the export is complete without this one.
                export.expect(call.first_token)
            self._env.poller.when(mark, partial(self._advance, call))
        elif isinstance(call, Offer):
            self._offer(call)
        elif isinstance(call, AbortExport):
            self.abort(call.key, reason_of(call))

    def knows(self, key: Key) -> bool:
        return key in self._exports

    def abort(self, key: Key, error: TransferError | None = None) -> None:
        if (export := self._exports.get(key)) is not None:
            export.end(error or TransferError("the context worker withdrew the request", "aborted"))

    def close(self) -> None:
        self._all_posted.clear()
        for export in list(self._exports.values()):
            export.end(TransferError("the context worker's transceiver was closed", "aborted"))
        for links in list(self._peers.values()):
            for link in links:
                link.close(TransferError("closed", "aborted"))

    async def settle(self) -> None:
        """After `close`: wait until every event is posted, which a peer that may still read holds up."""
        if self._exports:
            await self._all_posted.wait()

    def _offer(self, offer: Offer) -> None:
        key, peer = offer.key, offer.peer
        assert key not in self._exports, f"{key} is offered already"
        counter = self._env.counters.of(peer.worker_id, "sent")
        export = Export(self._env, self._staging, offer, counter, self._forget)
        self._exports[key] = export
        try:
            links = self._reach(peer)
        except TransferError as error:
            export.end(error)
        else:
            export.offer_over(links)

    def _advance(self, call: Computed | Finish, error: Exception | None) -> None:
        """The mark of `call` is reached: tell its export, or end the export if the device has failed (`error`)."""
        export = self._exports.get(call.key)
        if export is None:
            return
        if error is not None:
            export.end(TransferError(f"the KV could not be computed: {error}", "aborted"))
        elif isinstance(call, Computed):
            export.advance(call.num_tokens, call.layers)
        else:
            export.complete(call.first_token)

    def _forget(self, export: Export) -> None:
        del self._exports[export.key]
        if not self._exports:
            self._all_posted.set()
        self._forget_peers()

    def _reach(self, peer: KvAddress) -> list[ExportLink]:
        """Links to the ranks of `peer` that need something of this one, made where there are none."""
        links = self._peers.get(peer)
        if links is None:
            self._make_room()
            links = [self._connect(receiver) for receiver in self._receivers(peer)]
        elif any(link.closed for link in links):
            links = [self._connect(link.receiver) if link.closed else link for link in links]
        self._peers[peer] = links
        self._peers.move_to_end(peer)
        return links

    def _connect(self, receiver: ReceiverRank) -> ExportLink:
        return ExportLink(self._env, receiver, self._staging.buffer_bytes)

    def _forget_peers(self) -> None:
        """Drop peers all of whose links are closed. A worker that starts again has another address."""
        for peer in [peer for peer, links in self._peers.items() if all(link.closed for link in links)]:
            del self._peers[peer]

    def _make_room(self) -> None:
        """Make room for one more peer: close the links to those that were offered nothing for longest and that no
        export needs now."""
        self._forget_peers()
        idle = [links for links in self._peers.values() if all(link.is_idle for link in links)]
        for links in idle[: max(0, len(self._peers) - MAX_PEERS + 1)]:
            for link in links:
                link.close(TransferError("other peers are needed more", "aborted"))
        self._forget_peers()

    def _receivers(self, peer: KvAddress) -> list[ReceiverRank]:
        layouts = [_decode(peer, rank.layout) for rank in peer.ranks] or [self._env.pool.layout.whole()]
        places = [(rank.instance, rank.host or peer.host, rank.port) for rank in peer.ranks]
        places = places or [(peer.instance, peer.host, peer.port)]
        return [
            ReceiverRank(peer.worker_id, route.receiver, *places[route.receiver], route.shares)
            for route in routes(self._ranks, layouts)
            if route.sender == self._rank
        ]


def _decode(peer: KvAddress, layout: str) -> KvLayout:
    try:
        return protocol.decode(_layout_decoder, layout.encode())
    except MalformedMessage as error:
        raise TransferError(f"the address of {peer.worker_id} has a malformed layout: {error}", "protocol") from None

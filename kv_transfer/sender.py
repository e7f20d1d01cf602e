"""The context worker's half in one rank: all its exports by key, and the receivers that it has met.

Owns the tables; one handoff's life is `outgoing`'s, a connection's `outbound`'s. Which ranks of a receiver get what of
this rank follows from all ranks' layouts on both sides (`reshard`). Runs in the transceiver's loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from kv_transfer.environment import Environment
from kv_transfer.layout import KvLayout, Span
from kv_transfer.outbound import Outbound, Target
from kv_transfer.outgoing import Export
from kv_transfer.reshard import routes
from kv_transfer.staging import Staging
from pdserve import protocol
from pdserve.errors import MalformedMessage, TransferError
from pdserve.protocol import Key, KvAddress, KvRank

_layout_decoder: msgspec.json.Decoder[KvLayout] = msgspec.json.Decoder(KvLayout)


MAX_PEERS = 128
"""Peers to stay connected to. Each takes some MB and a dozen descriptors for each of its ranks that we send to."""


class Sender:
    """All exports of one rank. `connect_to` makes the connection to a receiver's rank at its first use."""

    def __init__(self, env: Environment, staging: Staging, connect_to: Callable[[Target], Outbound]) -> None:
        self.env = env
        self.staging = staging
        self._ranks: Sequence[KvLayout] = (env.pool.layout,)
        self._rank = 0
        self._connect_to = connect_to
        self._exports: dict[Key, Export] = {}
        self._all_posted = asyncio.Event()
        self._peers: OrderedDict[KvAddress, list[Outbound]] = OrderedDict()

    def join(self, ranks: Sequence[KvRank], rank: int) -> None:
        """This is number `rank` of its worker's `ranks`; alone, without this call."""
        self._ranks, self._rank = [_layout_decoder.decode(each.layout) for each in ranks], rank

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, block_ids: Sequence[int]) -> None:
        assert key not in self._exports, f"{key} is offered already"
        counter = self.env.counters.of(peer.worker_id, "sent")
        export = Export(self.env, self.staging, key, num_tokens, block_ids, counter, self._forget)
        self._exports[key] = export
        try:
            outbounds = self._reach(peer)
        except TransferError as error:
            export.end(error)
        else:
            export.push_over(outbounds)

    def computed(self, key: Key, num_tokens: int, layers: Span | None = None) -> None:
        """`layers` as in `Export.advance`."""
        if (export := self._exports.get(key)) is not None:
            export.advance(num_tokens, layers)

    def expect(self, key: Key, first_token: int) -> None:
        """As `Export.expect`."""
        if (export := self._exports.get(key)) is not None:
            export.expect(first_token)

    def finish(self, key: Key, first_token: int) -> None:
        if (export := self._exports.get(key)) is not None:
            export.complete(first_token)

    def abort(self, key: Key, error: TransferError | None = None) -> None:
        """Stop an export, for `error` or because the request was withdrawn."""
        if (export := self._exports.get(key)) is not None:
            export.end(error or TransferError("the context worker withdrew the request", "aborted"))

    def close(self) -> None:
        """End every export and close every connection."""
        self._all_posted.clear()
        for export in list(self._exports.values()):
            export.end(TransferError("the context worker's transceiver was closed", "aborted"))
        for outbounds in list(self._peers.values()):
            for outbound in outbounds:
                outbound.close(TransferError("closed", "aborted"))

    async def settle(self) -> None:
        """After `close`: wait until every event is posted, which a peer that may still read holds up."""
        if self._exports:
            await self._all_posted.wait()

    def _forget(self, export: Export) -> None:
        del self._exports[export.key]
        if not self._exports:
            self._all_posted.set()
        self._forget_peers()

    def _reach(self, peer: KvAddress) -> list[Outbound]:
        """Connections to the ranks of `peer` that need something of this one."""
        outbounds = self._peers.get(peer)
        if outbounds is None:
            self._make_room()
            outbounds = [self._connect_to(target) for target in self._targets(peer)]
        elif any(outbound.closed for outbound in outbounds):
            outbounds = [self._connect_to(each.target) if each.closed else each for each in outbounds]
        self._peers[peer] = outbounds
        self._peers.move_to_end(peer)
        return outbounds

    def _forget_peers(self) -> None:
        """Those that are gone: each start of a worker has an address of its own."""
        for peer in [peer for peer, each in self._peers.items() if all(outbound.closed for outbound in each)]:
            del self._peers[peer]

    def _make_room(self) -> None:
        """Hang up on whom we have sent nothing for longest; on nobody while all are needed."""
        self._forget_peers()
        idle = [each for each in self._peers.values() if all(outbound.is_idle for outbound in each)]
        for outbounds in idle[: max(0, len(self._peers) - MAX_PEERS + 1)]:
            for outbound in outbounds:
                outbound.close(TransferError("other peers are needed more", "aborted"))
        self._forget_peers()

    def _targets(self, peer: KvAddress) -> list[Target]:
        if peer.ranks:
            layouts = [_decode(peer, rank.layout) for rank in peer.ranks]
        else:
            layouts = [msgspec.structs.replace(self.env.pool.layout, layers=Span(0, 0), kv_heads=Span(0, 0))]
        places = [(rank.instance, rank.host or peer.host, rank.port) for rank in peer.ranks]
        places = places or [(peer.instance, peer.host, peer.port)]
        return [
            Target(peer.worker_id, route.receiver, *places[route.receiver], route.share)
            for route in routes(self._ranks, layouts)
            if route.sender == self._rank
        ]


def _decode(peer: KvAddress, layout: str) -> KvLayout:
    try:
        return protocol.decode(_layout_decoder, layout.encode())
    except MalformedMessage as error:
        raise TransferError(f"the address of {peer.worker_id} has a malformed layout: {error}", "protocol") from None

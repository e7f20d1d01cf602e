"""The generation worker's half: takes offers, refuses those that come too late, and knows every import by its key.

Owns the table of imports and the fence against old attempts; one handoff's life is `incoming`'s, the peers' connections
are `inbound`'s. Runs in the transceiver's loop.

A request has at most one import here: a newer attempt takes the place of an older one, and an attempt that is over, or
was aborted before its offer came, is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.backends.base import Link
from kv_transfer.environment import Environment
from kv_transfer.fence import AttemptFence
from kv_transfer.inbound import Inbound
from kv_transfer.incoming import Import
from kv_transfer.mover import Mark
from kv_transfer.staging import Staging
from kv_transfer.wire import Abort, Offer
from pdserve.errors import TransferError
from pdserve.handoff import ImportFailed, ImportOffered
from pdserve.protocol import Key


class Receiver:
    """All imports of one transceiver."""

    def __init__(self, env: Environment, staging: Staging) -> None:
        self.env = env
        self.staging = staging
        self._fence = AttemptFence(env.timeout_s)
        self._imports: dict[str, Import] = {}
        self._peers: set[Inbound] = set()

    def on_link(self, link: Link) -> None:
        """A sender has connected."""
        self._peers.add(Inbound(self.env, link, self._on_offer, self._peers.discard))

    def accept(self, key: Key, block_ids: Sequence[int], num_cached_tokens: int, mark: Mark) -> None:
        offered = self._imports.get(key.request_id)
        if offered is not None and offered.key == key:
            offered.accept(block_ids, num_cached_tokens, mark)
        elif not self._fence.refuses(key):
            self.env.post(ImportFailed(key, TransferError(f"{key} was never offered", "protocol")))

    def abort(self, key: Key) -> None:
        self._fence.close(key)
        offered = self._imports.get(key.request_id)
        if offered is not None and offered.key == key:
            error = TransferError("the generation worker withdrew the request", "aborted")
            offered.end(error, silent=not offered.accepted)

    def close(self) -> None:
        """End every import and close every connection."""
        error = TransferError("the generation worker's transceiver was closed", "aborted")
        for offered in list(self._imports.values()):
            offered.end(error)
        for peer in list(self._peers):
            peer.close(error)

    def forget(self, over: Import) -> None:
        """`over` has ended; its attempt and older ones are refused from now on."""
        self._fence.close(over.key)
        if self._imports.get(over.key.request_id) is over:
            del self._imports[over.key.request_id]

    def _on_offer(self, offer: Offer, inbound: Inbound) -> None:
        key, refusal = offer.key, self._refusal(offer)
        if refusal is not None:
            inbound.connection.send(Abort(offer.handoff, "refused", refusal))
            return
        older = self._imports.get(key.request_id)
        if older is not None:
            older.end(TransferError(f"attempt {key.attempt} has taken its place", "aborted"))
        offered = Import(self.env, self.staging, inbound, offer, self.forget)
        self._imports[key.request_id] = offered
        inbound.add(offered)
        self.env.post(ImportOffered(key, offer.num_tokens))

    def _refusal(self, offer: Offer) -> str | None:
        pool, current = self.env.pool, self._imports.get(offer.key.request_id)
        if self._fence.refuses(offer.key):
            return f"{offer.key} was withdrawn, or is over"
        if current is not None and current.key.attempt >= offer.key.attempt:
            return f"{offer.key} is not newer than attempt {current.key.attempt}, which is under way"
        if not 1 <= offer.num_tokens <= pool.num_blocks * pool.layout.tokens_per_block:
            return f"{offer.num_tokens} tokens don't fit into a pool of {pool.num_blocks} blocks"
        return None

"""The generation worker's half in one rank: takes offers, refuses those that come too late, knows every import by key.

Owns the table of imports and the fence against old attempts; one handoff's life is `incoming`'s, the peers' connections
are `inbound`'s. Runs in the transceiver's loop.

A request has at most one import here: a newer attempt takes the place of an older one, and an attempt that is over, or
was aborted before its offer came, is refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kv_transfer.backends.base import Link
from kv_transfer.environment import Environment
from kv_transfer.fence import AttemptFence
from kv_transfer.inbound import Inbound
from kv_transfer.incoming import Import
from kv_transfer.mark_poller import Mark
from kv_transfer.plan import num_blocks
from kv_transfer.staging import Staging, new_turns
from kv_transfer.wire import Abort, Offer
from pdserve.errors import TransferError
from pdserve.handoff import ImportFailed, ImportOffered
from pdserve.protocol import Key


class Receiver:
    """All imports of one rank. A follower `accepts_early`: rank 0 has an offer before it accepts, others may not."""

    def __init__(self, env: Environment, staging: Staging, accepts_early: bool = False) -> None:
        self.env = env
        self.staging = staging
        self._turns = new_turns(asyncio.get_running_loop().call_soon)
        self._accepts_early = accepts_early
        self._fence = AttemptFence(env.timeout_s)
        self._imports: dict[str, Import] = {}
        self._peers: set[Inbound] = set()

    def on_link(self, link: Link) -> None:
        """A sender has connected."""
        self._peers.add(Inbound(self.env, link, self.staging.slot_bytes, self._on_offer, self._peers.discard))

    def knows(self, key: Key) -> bool:
        """Whether `key` is offered and not over."""
        return self._find(key) is not None

    def accept(self, key: Key, block_ids: Sequence[int], num_cached_tokens: int, mark: Mark) -> None:
        found = self._find(key)
        if found is None and self._accepts_early and not self._is_late(key):
            found = self._open(key)
        if found is not None:
            found.accept(block_ids, num_cached_tokens, mark)
        elif self._accepts_early or not self._fence.refuses(key):
            self.env.post(ImportFailed(key, TransferError(f"{key} was never offered, or is over", "protocol")))

    def abort(self, key: Key, error: TransferError | None = None) -> None:
        """Stop an import, for `error` or because the request was withdrawn. Without `error`, one that was not accepted
        yet makes no event."""
        self._fence.close(key)
        if (found := self._find(key)) is not None:
            withdrawn = TransferError("the generation worker withdrew the request", "aborted")
            found.end(error or withdrawn, silent=error is None and not found.accepted)

    def close(self) -> None:
        """End every import and close every connection."""
        error = TransferError("the generation worker's transceiver was closed", "aborted")
        for offered in list(self._imports.values()):
            offered.end(error)
        for peer in list(self._peers):
            peer.close(error)

    def _find(self, key: Key) -> Import | None:
        found = self._imports.get(key.request_id)
        return found if found is not None and found.key == key else None

    def _is_late(self, key: Key) -> bool:
        current = self._imports.get(key.request_id)
        return self._fence.refuses(key) or (current is not None and current.key.attempt > key.attempt)

    def _open(self, key: Key) -> Import:
        """A new import; an older attempt of its request ends."""
        older = self._imports.get(key.request_id)
        if older is not None:
            older.end(TransferError(f"attempt {key.attempt} has taken its place", "aborted"))
        opened = self._imports[key.request_id] = Import(self.env, self.staging, self._turns, key, self._forget)
        return opened

    def _forget(self, over: Import) -> None:
        """`over` has ended; its attempt and older ones are refused from now on."""
        self._fence.close(over.key)
        if self._imports.get(over.key.request_id) is over:
            del self._imports[over.key.request_id]

    def _on_offer(self, offer: Offer, inbound: Inbound) -> None:
        refusal = self._refusal(offer, inbound)
        if refusal is not None:
            inbound.connection.send(Abort(offer.handoff, "refused", refusal))
            return
        found = self._find(offer.key)
        if found is not None:
            found.add(offer, inbound)
            return
        self._open(offer.key).add(offer, inbound)
        self.env.post(ImportOffered(offer.key, offer.num_tokens))

    def _refusal(self, offer: Offer, inbound: Inbound) -> str | None:
        pool, found = self.env.pool, self._find(offer.key)
        if self._fence.refuses(offer.key):
            return f"{offer.key} was withdrawn, or is over"
        if found is None and self._is_late(offer.key):
            return f"{offer.key} is not the newest attempt, which is under way"
        if not 1 <= offer.num_tokens <= pool.num_blocks * pool.layout.tokens_per_block:
            return f"{offer.num_tokens} tokens don't fit into a pool of {pool.num_blocks} blocks"
        if inbound.source is not None and not _can_be_read(
            offer, inbound.source.num_blocks, pool.layout.tokens_per_block
        ):
            return f"{len(offer.blocks)} blocks of the sender's are not what {offer.num_tokens} tokens are in"
        return None if found is None else found.refusal(offer, inbound)


def _can_be_read(offer: Offer, source_blocks: int, tokens_per_block: int) -> bool:
    blocks, needed = offer.blocks, num_blocks(offer.num_tokens, tokens_per_block)
    return (
        len(blocks) >= needed and min(blocks) >= 0 and max(blocks) < source_blocks and len(set(blocks)) == len(blocks)
    )

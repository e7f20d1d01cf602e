"""All imports of one rank, by key: takes offers up, and refuses those that come too late.

The transceiver calls `Imports`. It owns the table of imports, the links that senders have opened, and the fence against
old attempts; one handoff is `handoff.Import`, its part from one rank of the sender `share.ImportShare`, the link from
that rank `link.ImportLink`.

A request has at most one import here. A newer attempt ends the import of an older one. The offer of an attempt that is
over, or was aborted before the offer came, is refused.
"""

from __future__ import annotations

import asyncio

from generation_worker.fence import AttemptFence
from generation_worker.handoff import Import
from generation_worker.link import ImportLink
from generation_worker.readable_pool import ReadablePool
from kv_transfer.environment import Environment
from kv_transfer.layout import KvLayout, KvPoolView
from kv_transfer.mark_poller import Mark
from kv_transfer.networks.base import Link
from kv_transfer.ranks.calls import AbortImport, Accept, Call, reason_of
from kv_transfer.staging import Staging
from kv_transfer.turns import Turns
from kv_transfer.wire import Abort, Offer
from pdserve.errors import TransferError
from pdserve.handoff import ImportFailed, ImportOffered
from pdserve.protocol import Key, KvRank

READS_AT_ONCE = 4
"""Reads of other pools that are launched at a time: enough to keep the link busy, few enough to be fair."""

MAX_TOKENS = 1 << 40
"""The most tokens of a sequence. Where all groups have windows, their pools set no limit."""


class Imports:
    """The receiving `Half` of a transceiver; its methods are described there.

    Reads of other pools have turns of their own and do not wait for staging buffers: a peer that has stopped sending
    may hold a buffer for longer than a piece stays readable.
    """

    unpacks = True

    def __init__(self) -> None:
        self._imports: dict[str, Import] = {}
        self._links: set[ImportLink] = set()

    async def open(self, env: Environment, staging: Staging) -> int:
        """As `Half.open`."""
        self._env = env
        self._staging = staging
        self._reads = Turns(range(READS_AT_ONCE), asyncio.get_running_loop().call_soon)
        self._fence = AttemptFence(env.timeout_s)
        return await env.network.listen(env.options.host, env.options.port, env.instance, self._on_link)

    def meet(self, ranks: tuple[KvRank, ...], rank: int) -> None:
        """Nothing to learn: the sender computes what this rank needs."""

    def run(self, call: Call, mark: Mark) -> None:
        """As `Half.run`."""
        if isinstance(call, Accept):
            self._accept(call, mark)
        elif isinstance(call, AbortImport):
            self.abort(call.key, reason_of(call))

    def knows(self, key: Key) -> bool:
        return self._find(key) is not None

    def abort(self, key: Key, error: TransferError | None = None) -> None:
        """As `Half.abort`. An import that the engine withdraws (no `error`) before it was accepted posts no event."""
        self._fence.close(key)
        if (found := self._find(key)) is not None:
            withdrawn = TransferError("the generation worker withdrew the request", "aborted")
            found.end(error or withdrawn, silent=error is None and not found.accepted)

    def close(self) -> None:
        error = TransferError("the generation worker's transceiver was closed", "aborted")
        for offered in list(self._imports.values()):
            offered.end(error)
        for link in list(self._links):
            link.close(error)

    async def settle(self) -> None:
        """Nothing to wait for: no peer reads this worker's blocks."""

    def _accept(self, call: Accept, mark: Mark) -> None:
        key, early = call.key, self._env.accepts_early
        found = self._find(key)
        if found is None and early and not self._is_late(key):
            found = self._open_import(key)
        if found is not None:
            found.accept(call, mark)
        elif early or not self._fence.refuses(key):
            self._env.post(ImportFailed(key, TransferError(f"{key} was never offered, or is over", "protocol")))

    def _on_link(self, link: Link) -> None:
        """A sender has connected."""
        self._links.add(ImportLink(self._env, link, self._staging.buffer_bytes, self._on_offer, self._links.discard))

    def _find(self, key: Key) -> Import | None:
        found = self._imports.get(key.request_id)
        return found if found is not None and found.key == key else None

    def _is_late(self, key: Key) -> bool:
        current = self._imports.get(key.request_id)
        return self._fence.refuses(key) or (current is not None and current.key.attempt > key.attempt)

    def _open_import(self, key: Key) -> Import:
        """A new import; an older attempt of its request ends."""
        older = self._imports.get(key.request_id)
        if older is not None:
            older.end(TransferError(f"attempt {key.attempt} has taken its place", "aborted"))
        opened = self._imports[key.request_id] = Import(self._env, self._staging, self._reads, key, self._forget)
        return opened

    def _forget(self, over: Import) -> None:
        """`over` has ended; its attempt and older ones are refused from now on."""
        self._fence.close(over.key)
        if self._imports.get(over.key.request_id) is over:
            del self._imports[over.key.request_id]

    def _on_offer(self, offer: Offer, link: ImportLink) -> None:
        refusal = self._refusal(offer, link)
        if refusal is not None:
            link.connection.send(Abort(offer.handoff, "refused", refusal))
            return
        found = self._find(offer.key)
        if found is not None:
            found.add(offer, link)
            return
        self._open_import(offer.key).add(offer, link)
        self._env.post(ImportOffered(offer.key, offer.num_tokens))

    def _refusal(self, offer: Offer, link: ImportLink) -> str | None:
        pool, found = self._env.pool, self._find(offer.key)
        if self._fence.refuses(offer.key):
            return f"{offer.key} was withdrawn, or is over"
        if found is None and self._is_late(offer.key):
            return f"{offer.key} is not the newest attempt, which is under way"
        if not _fits(offer.num_tokens, pool):
            return f"{offer.num_tokens} tokens don't fit into a pool of {pool.groups[0].num_blocks} blocks"
        if link.source is not None and not _can_be_read(offer, link.source, pool.layout):
            tables = [len(table) for table in offer.tables]
            return f"{tables} blocks of the sender's are not what {offer.num_tokens} tokens are in"
        return None if found is None else found.refusal(offer, link)


def _fits(num_tokens: int, pool: KvPoolView) -> bool:
    if not 1 <= num_tokens <= MAX_TOKENS:
        return False
    for group in pool.groups:
        width = group.layout.tokens_per_block
        if group.layout.needed(num_tokens, 0, width).size > group.num_blocks * width:
            return False
    return True


def _can_be_read(offer: Offer, source: ReadablePool, layout: KvLayout) -> bool:
    """Whether the offer's tables name blocks that the sender has, each once, for all that may be read of them."""
    if len(offer.tables) != len(layout.groups):
        return False
    for number, (table, group) in enumerate(zip(offer.tables, layout.groups, strict=True)):
        if (readable := source.groups.get(number)) is None:
            continue
        width = group.tokens_per_block
        used = table[group.needed(offer.num_tokens, 0, width).first // width :]
        if not group.is_named(table, offer.num_tokens) or min(used, default=0) < 0 or len(set(used)) != len(used):
            return False
        if max(table) >= readable.num_blocks or min(table) < -1:
            return False
    return True

"""A mover between two engines of one process that moves nothing by itself: the test says when what happens.

It copies the shadow KV of one `FakeRunner` to another's, and polices block ownership: until an ending event is
posted, the source blocks must keep what was announced as computed, and the destination blocks are scribbled on when
an import is accepted, and again when it is cut short. A block that is reused too early, or still needed where an import
is to go, ends in `WrongKv` on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pdserve.errors import TransferError
from pdserve.handoff import (
    ExportDone,
    ExportFailed,
    HandoffCost,
    HandoffEvent,
    ImportDone,
    ImportFailed,
    ImportOffered,
)
from pdserve.protocol import Key, KvAddress
from tests.fakes.fake_runner import FakeRunner

PEER = KvAddress("generation-0", "i0", "localhost", 1, "layout")
Kv = tuple[int, int]
Tables = list[list[int]]
NOTHING = (-2, -2)


@dataclass
class Transfer:
    key: Key
    num_tokens: int
    source_tables: Tables
    computed: list[list[Kv]] = field(default_factory=list)
    first_token: int | None = None
    announced: bool = False
    target_tables: Tables | None = None
    num_cached_tokens: int = 0
    cancelled: str | None = None


class FakeLink:
    """Joins a context engine, by `exporter`, with a generation engine, by `importer`."""

    def __init__(self, source: FakeRunner, target: FakeRunner) -> None:
        self.transfers: dict[Key, Transfer] = {}
        self.refused: set[Key] = set()
        self.cost = HandoffCost()
        self.exporter = _Exporter(self)
        self.importer = _Importer(self)
        self.post_to_source: Callable[[HandoffEvent], None] = lambda _: None
        self.post_to_target: Callable[[HandoffEvent], None] = lambda _: None
        self.source = source
        self.target = target

    def advance(self, key: Key) -> None:
        """One thing happens to the transfer: it ends if it was stopped, is offered, or completes."""
        transfer = self.transfers[key]
        if transfer.cancelled is not None:
            self._end(transfer, TransferError(transfer.cancelled, "aborted"))
        elif key in self.refused:
            self._end(transfer, TransferError("refused", "refused"))
        elif not transfer.announced:
            transfer.announced = True
            self.post_to_target(ImportOffered(key, transfer.num_tokens))
        elif transfer.first_token is not None and transfer.target_tables is not None:
            self._complete(transfer)

    def fail(self, key: Key) -> None:
        """The transfer breaks, in whatever state it is."""
        self._end(self.transfers[key], TransferError("the peer is gone", "peer_lost"))

    def _complete(self, transfer: Transfer) -> None:
        assert transfer.target_tables is not None
        assert transfer.first_token is not None
        assert len(transfer.computed) == transfer.num_tokens
        self._check_source(transfer)
        for position, kv in enumerate(transfer.computed):
            tables = zip(transfer.source_tables, transfer.target_tables, strict=True)
            for pool, (source, target), each in zip(self.target.pools, tables, kv, strict=True):
                slot = self.target.slot(target, position)
                if slot[0] < 0:
                    continue
                assert self.source.slot(source, position)[0] >= 0, "the sender does not hold what the receiver wants"
                if position < transfer.num_cached_tokens:
                    assert pool[slot] == each, "a reused block holds another prefix"
                pool[slot] = each
        del self.transfers[transfer.key]
        self.post_to_target(ImportDone(transfer.key, transfer.first_token, self.cost))
        self.post_to_source(ExportDone(transfer.key, self.cost))

    def _end(self, transfer: Transfer, error: TransferError) -> None:
        self._check_source(transfer)
        del self.transfers[transfer.key]
        self.scribble(transfer)
        if transfer.announced and (transfer.key not in self.refused or transfer.target_tables is not None):
            self.post_to_target(ImportFailed(transfer.key, error))
        self.post_to_source(ExportFailed(transfer.key, error))

    def scribble(self, transfer: Transfer) -> None:
        """The mover may write to the destination blocks: what stood there before is lost."""
        for pool, table in zip(self.target.pools, transfer.target_tables or (), strict=False):
            for position in range(transfer.num_cached_tokens, transfer.num_tokens):
                pool[self.target.slot(table, position)] = (-1, -1)

    def read(self, transfer: Transfer, position: int) -> list[Kv]:
        """What stands in the source blocks, in each group; nothing where there is no block."""
        slots = [self.source.slot(table, position) for table in transfer.source_tables]
        return [pool.get(slot, NOTHING) for pool, slot in zip(self.source.pools, slots, strict=True)]

    def _check_source(self, transfer: Transfer) -> None:
        for position, kv in enumerate(transfer.computed):
            assert self.read(transfer, position) == kv, "an exported block was reused before the export ended"


class _Exporter:
    def __init__(self, link: FakeLink) -> None:
        self._link = link

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, tables: Sequence[Sequence[int]]) -> None:
        assert key not in self._link.transfers
        assert all(len(table) * self._link.source.limits.tokens_per_block >= num_tokens for table in tables)
        self._link.transfers[key] = Transfer(key, num_tokens, [list(table) for table in tables])

    def computed(self, key: Key, num_tokens: int, num_layers: int | None = None) -> None:
        transfer = self._link.transfers.get(key)
        if transfer is None:
            return  # a step that was launched before the export ended
        assert num_layers is None
        # A step that failed is run again, and may have told so before.
        assert num_tokens <= transfer.num_tokens
        for position in range(len(transfer.computed), num_tokens):
            transfer.computed.append(self._link.read(transfer, position))

    def finish(self, key: Key, first_token: int) -> None:
        transfer = self._link.transfers[key]
        assert transfer.first_token is None
        assert len(transfer.computed) == transfer.num_tokens
        transfer.first_token = first_token

    def abort(self, key: Key) -> None:
        # Unknown is fine: the ending event may be on its way to an engine that has not seen it yet.
        if key in self._link.transfers:
            self._link.transfers[key].cancelled = "the context worker stopped it"


class _Importer:
    def __init__(self, link: FakeLink) -> None:
        self._link = link

    def accept(self, key: Key, tables: Sequence[Sequence[int]], num_cached_tokens: int) -> None:
        transfer, width = self._link.transfers.get(key), self._link.target.limits.tokens_per_block
        assert num_cached_tokens % width == 0
        if transfer is None:
            return  # withdrawn; `ImportFailed` is on its way
        assert transfer.announced
        assert transfer.target_tables is None
        assert num_cached_tokens < transfer.num_tokens <= min(map(len, tables)) * width
        transfer.target_tables = [list(table) for table in tables]
        transfer.num_cached_tokens = num_cached_tokens
        self._link.scribble(transfer)

    def abort(self, key: Key) -> None:
        self._link.refused.add(key)

"""The two ends of a transceiver that engines are given: `pdserve.handoff.KvExporter` and `KvImporter`.

Called in the engine's thread, where they take a mark of its stream; what they ask for is done in the transceiver's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kv_transfer.layout import Span
from kv_transfer.mark_poller import Mark
from kv_transfer.ranks.calls import AbortExport, AbortImport, Accept, Call, Computed, Finish, Offer
from kv_transfer.ranks.steps import Steps
from pdserve.errors import TransferError
from pdserve.handoff import ExportFailed, HandoffEvent
from pdserve.protocol import Key, KvAddress


class Caller(Protocol):
    """The transceiver, as its ends see it."""

    @property
    def steps(self) -> Steps: ...

    def mark(self) -> Mark: ...

    def call(self, call: Call, mark: Mark = None, otherwise: HandoffEvent | None = None) -> None:
        """Do as `call` says in the transceiver's thread; if it is gone, post `otherwise`."""


class Exporter:
    """`KvExporter` over a transceiver whose rank holds `layers` of the model."""

    def __init__(self, caller: Caller, layers: Span) -> None:
        self._caller = caller
        self._layers = layers

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, block_ids: Sequence[int]) -> None:
        closed = ExportFailed(key, TransferError("the context worker's transceiver is closed", "aborted"))
        self._caller.call(Offer(key, peer, num_tokens, tuple(block_ids)), otherwise=closed)

    def computed(self, key: Key, num_tokens: int, num_layers: int | None = None) -> None:
        """As `KvExporter` has it, of every layer on every rank; or with `num_layers` of the first layers that this rank
        holds, on this rank alone: then every rank's engine says so itself, in the midst of a forward pass."""
        layers = None if num_layers is None else Span(self._layers.first, self._layers.first + num_layers)
        self._caller.call(Computed(key, num_tokens, layers, self._caller.steps.count), self._caller.mark())

    def finish(self, key: Key, first_token: int) -> None:
        self._caller.call(Finish(key, first_token, self._caller.steps.count), self._caller.mark())

    def abort(self, key: Key) -> None:
        self._caller.call(AbortExport(key))


class Importer:
    """`KvImporter` over a transceiver."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def accept(self, key: Key, block_ids: Sequence[int], num_cached_tokens: int) -> None:
        """As `KvImporter` has it. A transceiver that is closed has answered already: it ended all that was offered."""
        call = Accept(key, tuple(block_ids), num_cached_tokens, self._caller.steps.count)
        self._caller.call(call, self._caller.mark())

    def abort(self, key: Key) -> None:
        self._caller.call(AbortImport(key))

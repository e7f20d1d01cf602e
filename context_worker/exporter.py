"""What an engine calls to send KV: turns each call into a record for the transceiver's thread.

It is the real `pdserve.handoff.KvExporter`. Calls return at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.layout import Span
from kv_transfer.ranks.calls import AbortExport, Computed, Finish, Offer
from kv_transfer.transceiver import Transceiver
from pdserve.errors import TransferError
from pdserve.handoff import ExportFailed
from pdserve.protocol import Key, KvAddress


class Exporter:
    """Sends through `transceiver`, which was made with `Exports`."""

    def __init__(self, transceiver: Transceiver) -> None:
        self._transceiver = transceiver
        self._first_layer = transceiver.layout.layers.first

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, tables: Sequence[Sequence[int]]) -> None:
        closed = ExportFailed(key, TransferError("the context worker's transceiver is closed", "aborted"))
        self._transceiver.call(Offer(key, peer, num_tokens, tuple(map(tuple, tables))), otherwise=closed)

    def computed(self, key: Key, num_tokens: int, num_layers: int | None = None) -> None:
        """See `KvExporter.computed`. Without `num_layers` it holds for all layers on all ranks. With `num_layers` it
        holds for the first so many layers of this rank alone; each rank's `StepExecutor` calls it during a forward
        pass."""
        layers = None if num_layers is None else Span(self._first_layer, self._first_layer + num_layers)
        transceiver = self._transceiver
        transceiver.call(Computed(key, num_tokens, layers, transceiver.steps.count), transceiver.mark())

    def finish(self, key: Key, first_token: int) -> None:
        transceiver = self._transceiver
        transceiver.call(Finish(key, first_token, transceiver.steps.count), transceiver.mark())

    def abort(self, key: Key) -> None:
        self._transceiver.call(AbortExport(key))

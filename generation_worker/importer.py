"""`pdserve.handoff.KvImporter` over a transceiver: called in the engine's thread, done in the transceiver's."""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.ranks.calls import AbortImport, Accept
from kv_transfer.transceiver import Transceiver
from pdserve.protocol import Key


class Importer:
    """`transceiver` has `Imports`."""

    def __init__(self, transceiver: Transceiver) -> None:
        self._transceiver = transceiver

    def accept(self, key: Key, tables: Sequence[Sequence[int]], num_cached_tokens: int) -> None:
        """As `KvImporter` has it. A transceiver that is closed has answered already: it ended all that was offered."""
        transceiver = self._transceiver
        call = Accept(key, tuple(map(tuple, tables)), num_cached_tokens, transceiver.steps.count)
        transceiver.call(call, transceiver.mark())

    def abort(self, key: Key) -> None:
        self._transceiver.call(AbortImport(key))

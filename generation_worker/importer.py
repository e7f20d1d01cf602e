"""What an engine calls to receive KV: turns each call into a record for the transceiver's thread.

It is the real `pdserve.handoff.KvImporter`. Calls return at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from kv_transfer.ranks.calls import AbortImport, Accept
from kv_transfer.transceiver import Transceiver
from pdserve.protocol import Key


class Importer:
    """Receives through `transceiver`, which was made with `Imports`."""

    def __init__(self, transceiver: Transceiver) -> None:
        self._transceiver = transceiver

    def accept(self, key: Key, tables: Sequence[Sequence[int]], num_cached_tokens: int) -> None:
        """See `KvImporter.accept`. A closed transceiver needs no answer here: it has ended everything that was
        offered."""
        transceiver = self._transceiver
        call = Accept(key, tuple(map(tuple, tables)), num_cached_tokens, transceiver.steps.count)
        transceiver.call(call, transceiver.mark())

    def abort(self, key: Key) -> None:
        self._transceiver.call(AbortImport(key))

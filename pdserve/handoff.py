"""The seam between an engine and whatever moves KV out of it or into it.

The engine calls an exporter (context phase) or importer (generation phase) from its own thread; calls return at
once. What happens in the mover's thread comes back as events through `Engine.post`. Block ownership is exact:

- Exported blocks stay the sequence's until `ExportDone` or `ExportFailed`, even when the request is aborted: the
  engine calls `abort` and waits for the event, so a block is never reused while it is being read.
- Imported blocks are named in `accept` and may be written until `ImportDone` or `ImportFailed`; an aborted import
  ends in `ImportFailed`, and only then are its blocks freed.
- Every `offer` and every `accept` is answered by exactly one ending event within the mover's own deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.errors import TransferError
from pdserve.protocol import Key, KvAddress


class KvExporter(Protocol):
    """Pushes a context sequence's KV to the generation worker that expects it."""

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, block_ids: Sequence[int]) -> None:
        """Announce a handoff of `num_tokens` prompt tokens, whose KV is or will be in `block_ids`."""

    def computed(self, key: Key, num_tokens: int) -> None:
        """KV of the first `num_tokens` tokens is complete (on the compute stream) and may be pushed."""

    def finish(self, key: Key, first_token: int) -> None:
        """The last chunk is computed and `first_token` sampled; it rides with the last message."""

    def abort(self, key: Key) -> None:
        """Stop the handoff. `ExportFailed` (or `ExportDone`, if it was too late) follows."""


class KvImporter(Protocol):
    """Receives a generation sequence's KV."""

    def accept(self, key: Key, block_ids: Sequence[int], num_cached_tokens: int) -> None:
        """Admit an offered handoff into `block_ids`. The first `num_cached_tokens` (whole blocks) are present
        already, by prefix reuse, and are not sent."""

    def abort(self, key: Key) -> None:
        """Refuse or stop a handoff, also one not offered yet. If it was accepted, `ImportFailed` follows."""


@dataclass(frozen=True, slots=True)
class ExportDone:
    """The peer has everything; the blocks are free."""

    key: Key


@dataclass(frozen=True, slots=True)
class ExportFailed:
    key: Key
    error: TransferError


@dataclass(frozen=True, slots=True)
class ImportOffered:
    """A context worker has taken the request up and wants `num_tokens` tokens' worth of blocks."""

    key: Key
    num_tokens: int


@dataclass(frozen=True, slots=True)
class ImportDone:
    """All KV is in place, ordered before whatever the engine launches next. `first_token` was sampled by the peer."""

    key: Key
    first_token: int


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """The handoff ended early: after an offer that was withdrawn, or an import that failed or was aborted."""

    key: Key
    error: TransferError


HandoffEvent = ExportDone | ExportFailed | ImportOffered | ImportDone | ImportFailed

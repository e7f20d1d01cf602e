"""The border between an engine and the transceiver that moves KV out of it or into it.

The engine calls a `KvExporter` (context phase) or a `KvImporter` (generation phase) from its own thread, and so does
its runner while it launches a step. Calls return at once. What happens in the transceiver's thread comes back as
events, through `Engine.post`. At each moment it is exact who may use a block:

- Exported blocks stay the sequence's until `ExportDone` or `ExportFailed`, even when the request is aborted: the
  engine calls `abort` and waits for the event, so a block is never reused while it is being read.
- Imported blocks are named in `accept` and may be written until `ImportDone` or `ImportFailed`; an aborted import
  ends in `ImportFailed`, and only then are its blocks freed. Nothing is written before what the engine's stream had
  enqueued by `accept` has run, be it of a step that failed.
- Every `offer` and every `accept` is answered by exactly one ending event. The transceiver bounds the time in which
  there is something to transfer, and how long a peer may be silent. It does not bound an offer that waits to be
  accepted, nor a prefill: those end with the request, whose deadline is the engine's, by `abort`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.errors import TransferError
from pdserve.protocol import Key, KvAddress


class KvExporter(Protocol):
    """Pushes a context sequence's KV to the generation worker that expects it."""

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, tables: Sequence[Sequence[int]]) -> None:
        """Announce a handoff of `num_tokens` prompt tokens, whose KV is or will be in the blocks of `tables`: one block
        table for each group of the cache. What is before a group's window may be -1."""

    def computed(self, key: Key, num_tokens: int, num_layers: int | None = None) -> None:
        """KV of the first `num_tokens` tokens is complete, on the compute stream as of now, and may be pushed.

        With `num_layers` in the first so many layers that the calling rank holds, and on this rank alone: every rank's
        runner says so itself. Without, in all layers of all ranks. After a step that failed, it may be told again.
        """

    def finish(self, key: Key, first_token: int) -> None:
        """The whole prompt is computed and `first_token` sampled; it rides with the last message."""

    def abort(self, key: Key) -> None:
        """Stop the handoff. `ExportFailed` (or `ExportDone`, if it was too late) follows."""


class KvImporter(Protocol):
    """Receives a generation sequence's KV."""

    def accept(self, key: Key, tables: Sequence[Sequence[int]], num_cached_tokens: int) -> None:
        """Admit an offered handoff into the blocks of `tables`, one block table for each group of the cache, -1 before
        its window. The first `num_cached_tokens` (whole blocks) are present already, by prefix reuse, and are not sent;
        a state is sent in any case."""

    def abort(self, key: Key) -> None:
        """Refuse or stop a handoff, also one not offered yet. If it was accepted, `ImportFailed` follows."""


@dataclass(frozen=True, slots=True)
class HandoffCost:
    """What a completed handoff took, all ranks together. Durations are by the clock of this side's transceiver, except
    `waited_s`, which the sender measures and tells.

    Attributes:
        peer: the other worker's id.
        nbytes: bytes of KV that were moved.
        seconds: from the offer until all KV is in place, as this side knows it. The prefill is included.
        moving_s: the part of it from the first pack on; at the receiver, from when the first message was due.
        busy_s: the part of it in which payload was under way.
        exposed_s: time that hid behind no computation: from when all KV is computed and the first token known, until
            all KV is in place. The receiver learns that moment by a message, and adds `waited_s`, so its figure lacks
            the travel of one message. The sender's figure includes the travel of the answer.
        waited_s: the first part of `exposed_s`, in which the receiver had no blocks yet.
    """

    peer: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    waited_s: float = 0.0
    moving_s: float = 0.0

    def beside(self, other: HandoffCost) -> HandoffCost:
        """The cost of two ranks' parts, done at the same time: bytes add up, of each duration the longer counts."""
        return HandoffCost(
            self.peer or other.peer,
            self.nbytes + other.nbytes,
            max(self.seconds, other.seconds),
            max(self.busy_s, other.busy_s),
            max(self.exposed_s, other.exposed_s),
            max(self.waited_s, other.waited_s),
            max(self.moving_s, other.moving_s),
        )


FREE = HandoffCost()


@dataclass(frozen=True, slots=True)
class ExportDone:
    """The peer has everything; the blocks are free."""

    key: Key
    cost: HandoffCost = field(default=FREE, compare=False)


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
    cost: HandoffCost = field(default=FREE, compare=False)


@dataclass(frozen=True, slots=True)
class ImportFailed:
    """The handoff ended early: after an offer that was withdrawn, or an import that failed or was aborted."""

    key: Key
    error: TransferError


HandoffEvent = ExportDone | ExportFailed | ImportOffered | ImportDone | ImportFailed

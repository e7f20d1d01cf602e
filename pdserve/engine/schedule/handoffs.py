"""The engine's dealings with the transceiver: what is exported, what is imported, and whose blocks the transceiver
still knows.

Owns the offers that came before their requests and the sequences that ended while their blocks were in use elsewhere
(held until the transceiver's ending event and the last step in flight). Doesn't decide who is scheduled and doesn't
answer clients: it tells the engine which sequence a transceiver's event ends, and how.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pdserve.engine.schedule.admission import RequestTable
from pdserve.engine.schedule.kv_cache import Tables
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.scheduler import Scheduler
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.errors import Overloaded, PdserveError, RequestError, TransferError
from pdserve.handoff import (
    ExportDone,
    ExportFailed,
    HandoffEvent,
    ImportDone,
    ImportFailed,
    ImportOffered,
    KvExporter,
    KvImporter,
)
from pdserve.protocol import FinishReason, GenerateRequest, Key

log = logging.getLogger(__name__)

_S = SequenceState
_EXPECTED_IN: dict[type, frozenset[SequenceState]] = {
    ExportDone: frozenset({_S.EXPORTING}),
    ExportFailed: frozenset({_S.RUNNING, _S.EXPORTING}),
    ImportDone: frozenset({_S.RECEIVING}),
    ImportFailed: frozenset({_S.AWAITING_KV, _S.RECEIVING}),
}


@dataclass(frozen=True, slots=True)
class Ending:
    """A sequence that must be finished now."""

    sequence: Sequence
    reason: FinishReason
    error: PdserveError | None = None


class Handoffs:
    """Exports and imports of one engine. Without exporter or importer the phases that need them are refused."""

    def __init__(
        self,
        scheduler: Scheduler,
        requests: RequestTable,
        vocab_size: int,
        exporter: KvExporter | None,
        importer: KvImporter | None,
    ) -> None:
        self.held: dict[Key, Sequence] = {}
        self.exporting: dict[Sequence, None] = {}
        self.expecting_scratch: set[Sequence] = set()
        self._scheduler = scheduler
        self._requests = requests
        self._vocab_size = vocab_size
        self._exporter = exporter
        self._importer = importer
        self._early_offers: dict[Key, tuple[int, float]] = {}

    def check_phase(self, request: GenerateRequest) -> None:
        """Raises `RequestError` if this engine has no transceiver for the request's phase."""
        if request.phase == "generation" and self._importer is None:
            raise RequestError("this engine receives no KV; generation requests need a generation worker", "phase")
        if request.phase == "context" and request.peer is not None and self._exporter is None:
            raise RequestError("this engine sends no KV; a context request with a peer needs a context worker", "peer")
        if request.kv_only and (request.phase == "both" or request.peer is None):
            raise RequestError("KV moves from a context worker to a generation worker: peer names the other", "peer")

    def expect(self, sequence: Sequence, now_s: float) -> Ending | None:
        """A generation request has come; its offer may have come already."""
        offer = self._early_offers.pop(sequence.key, None)
        return None if offer is None else self._match(sequence, *offer)

    def move_scratch(self, sequence: Sequence, now_s: float) -> Ending | None:
        """A `kv_only` request has come. It is never queued, takes no block that anybody could miss, and the blocks'
        content is offered for no reuse."""
        peer, num_tokens = sequence.request.peer, len(sequence.token_ids)
        if sequence.request.phase == "generation":
            self.expecting_scratch.add(sequence)
            return self.expect(sequence, now_s)
        assert self._exporter is not None
        assert peer is not None
        if not self._scheduler.lend(sequence):
            return self._no_scratch(sequence)
        sequence.move_to(_S.RUNNING)
        sequence.handoff_open = True
        self._exporter.offer(sequence.key, peer, num_tokens, self._moved(sequence))
        self._exporter.computed(sequence.key, num_tokens)
        self.export(sequence, 0)
        return None

    def refuse(self, key: Key) -> None:
        """No sequence will ever receive `key`: let the sender know at once."""
        self._early_offers.pop(key, None)
        if self._importer is not None:
            self._importer.abort(key)

    def announce(self, step: PlannedStep) -> None:
        """Offer the sequences of `step` that were admitted and have a peer: the transceiver learns their blocks."""
        for sequence in step.admitted:
            peer = sequence.request.peer
            if sequence.export_key is not None and peer is not None and self._exporter is not None:
                sequence.handoff_open = True
                self._exporter.offer(sequence.key, peer, len(sequence.token_ids), self._moved(sequence))
                if sequence.num_proven:
                    self._exporter.computed(sequence.key, sequence.num_proven)

    def accept(self, sequence: Sequence) -> None:
        """Let the transceiver write to the blocks that `sequence`, an offered import, has got."""
        assert self._importer is not None
        sequence.move_to(_S.RECEIVING)
        self._importer.accept(sequence.key, self._moved(sequence), sequence.num_computed)

    def export(self, sequence: Sequence, first_token: int) -> None:
        """The prompt is computed: the sequence only waits for the transceiver now."""
        assert self._exporter is not None
        self._scheduler.remove(sequence)
        sequence.move_to(_S.EXPORTING)
        self.exporting[sequence] = None
        self._exporter.finish(sequence.key, first_token)

    def close(self, sequence: Sequence) -> None:
        """The client has its `Finished`: free the sequence's blocks, now or when the transceiver lets go of them."""
        self._scheduler.remove(sequence)
        self.exporting.pop(sequence, None)
        self.expecting_scratch.discard(sequence)
        if sequence.handoff_open:
            transceiver = self._importer if sequence.request.phase == "generation" else self._exporter
            assert transceiver is not None
            transceiver.abort(sequence.key)
            # Without having heard of any blocks the transceiver has none to let go.
            sequence.handoff_open = sequence.state is not _S.AWAITING_KV
        if sequence.num_in_flight or sequence.handoff_open:
            sequence.move_to(_S.ABORTING)
            self.held[sequence.key] = sequence
        else:
            self._scheduler.release(sequence)
            sequence.move_to(_S.FINISHED)

    def handle(self, event: HandoffEvent, now_s: float) -> Ending | None:
        """Take note of what the transceiver says; returns the sequence that it ends, if it does."""
        sequence = self._requests.find(event.key)
        if isinstance(event, ImportOffered):
            return self._on_offer(event, sequence, now_s)
        self._early_offers.pop(event.key, None)
        if sequence is None:
            self._let_go(event.key)
            return None
        if sequence.state not in _EXPECTED_IN[type(event)] or not sequence.handoff_open:
            log.error("%s: the transceiver posted %s to %s", event.key, type(event).__name__, sequence)
            return None
        sequence.handoff_open = False
        if isinstance(event, ExportFailed | ImportFailed):
            return Ending(sequence, "error", event.error)
        sequence.milestones.handed_off_s, sequence.milestones.handoff_cost = now_s, event.cost
        if sequence.request.kv_only:
            sequence.milestones.handoff_from_s = now_s - event.cost.seconds
            return Ending(sequence, "handoff")
        if isinstance(event, ExportDone):
            return Ending(sequence, "handoff")
        return self._on_import_done(sequence, event.first_token, now_s)

    def _on_offer(self, event: ImportOffered, sequence: Sequence | None, now_s: float) -> Ending | None:
        if sequence is not None:
            return self._match(sequence, event.num_tokens, now_s)
        if self._requests.is_outdated(event.key):
            self.refuse(event.key)
        else:
            self._early_offers[event.key] = (event.num_tokens, now_s)
        return None

    def _match(self, sequence: Sequence, num_tokens: int, offered_s: float) -> Ending | None:
        known = sequence in self._scheduler.offered or bool(sequence.tables[0])
        if sequence.state is not _S.AWAITING_KV or known:
            log.error("%s: offered again", sequence)
            return None
        sequence.milestones.handoff_from_s = offered_s
        if num_tokens != len(sequence.token_ids):
            message = f"KV of {num_tokens} tokens was offered for {len(sequence.token_ids)} tokens"
            return Ending(sequence, "error", TransferError(message, "protocol"))
        if sequence.request.kv_only:
            return None if self._scheduler.lend(sequence) else self._no_scratch(sequence)
        self._scheduler.offered[sequence] = None
        return None

    def _moved(self, sequence: Sequence) -> Tables:
        """The blocks that the transceiver reads or writes, group by group."""
        return self._scheduler.blocks.moved(sequence.tables, len(sequence.token_ids))

    def _no_scratch(self, sequence: Sequence) -> Ending:
        blocks = self._scheduler.blocks
        wanted, counts = blocks.blocks_for(len(sequence.token_ids)), blocks.counts()
        message = (
            f"{wanted} blocks are wanted to measure with, and as many to be left; {counts.free} of {counts.total} are "
            f"free, and {counts.cached} hold prefixes for reuse"
        )
        return Ending(sequence, "error", Overloaded(message, "num_tokens"))

    def _on_import_done(self, sequence: Sequence, first_token: int, now_s: float) -> Ending | None:
        if not 0 <= first_token < self._vocab_size:
            message = f"the first token, {first_token}, is not in the vocabulary"
            return Ending(sequence, "error", TransferError(message, "protocol"))
        sequence.milestones.decode_from_s = now_s
        self._scheduler.received(sequence, first_token)
        reason = sequence.end_reason()
        return None if reason is None else Ending(sequence, reason)

    def _let_go(self, key: Key) -> None:
        """The transceiver is done with an ended sequence."""
        sequence = self.held.get(key)
        if sequence is not None:
            sequence.handoff_open = False
            self.free(sequence)

    def free(self, sequence: Sequence) -> None:
        """Give an ended sequence's blocks back, if neither the transceiver nor a step in flight uses them any more."""
        if not sequence.handoff_open and not sequence.num_in_flight:
            del self.held[sequence.key]
            self._scheduler.release(sequence)
            sequence.move_to(_S.FINISHED)

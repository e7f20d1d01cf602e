"""Blocks that several sequences hold: what becomes of them when somebody writes to one, or a step fails.

Owns the sequences that have forked since the last plan, and those whose KV a copy is still to bring. Each full block is
computed by one sequence. Others that begin with the same tokens hold it from the launch of that step on, and read it in
later steps, which the device runs after it. If the step fails, all of them hold a block with nothing in it, and the
first of them that is in a step computes it for all.
"""

from __future__ import annotations

from pdserve.engine.schedule.kv_cache import KvCache
from pdserve.engine.schedule.plan import Plan
from pdserve.engine.schedule.sequence import Sequence, SequenceState


class SharedBlocks:
    """The scheduler's view of `blocks` that more than one of its sequences hold."""

    def __init__(self, blocks: KvCache) -> None:
        self._blocks = blocks
        self._forked: dict[Sequence, None] = {}
        self._relying: dict[Sequence, None] = {}

    def launched(self, plan: Plan) -> None:
        """The step of `plan` is on its way: later steps may read what it computes of prompts."""
        width = self._blocks.tokens_per_block
        for sequence, _ in plan.chunks():
            first, end = sequence.num_registered_blocks, sequence.num_planned // width
            if end > first:
                self._blocks.register(sequence.hashes, sequence.tables, first, end, pending=True)
                sequence.num_registered_blocks = end

    def succeeded(self, plan: Plan) -> None:
        """The step of `plan` has: what it has computed of prompts, or copied for them, depends on nothing any more."""
        for sequence, item in plan.chunks():
            self._blocks.settle(sequence.tables, item.start + len(item.token_ids))

    def failed(self, plan: Plan) -> None:
        """The step of `plan` has, after its launch and all steps before it: nothing of it is known to be computed."""
        self.not_copied(plan)
        for sequence, item in plan.chunks():
            self._blocks.void(sequence.tables, item.start + len(item.token_ids))

    def not_copied(self, plan: Plan) -> None:
        """The copies of `plan` may not have been made."""
        self._blocks.groups[0].host.forget(copy.target for copy in plan.copies if copy.kind == "offload")

    def forked(self, sequence: Sequence, child: Sequence) -> None:
        """Both hold the same blocks, and will write to the last."""
        self._forked[sequence] = self._forked[child] = None

    def forget(self, sequence: Sequence) -> None:
        """`sequence` is in no queue any more."""
        self._forked.pop(sequence, None)
        self._relying.pop(sequence, None)

    def planned(self, plan: Plan) -> None:
        """`plan` takes the copies along that were decided on until now."""
        plan.relying.extend(self._relying)
        self._relying.clear()

    def own_blocks(self) -> bool:
        """Give each of those that forked a block of its own to write to; False if there is none for somebody."""
        # Who has a step in flight comes last, and keeps the block: what is proven of it must not depend on a copy.
        for sequence in sorted(self._forked, key=lambda each: each.num_in_flight):
            index, offset = divmod(sequence.num_planned, self._blocks.tokens_per_block)
            before = list(sequence.tables)
            is_owner = not offset or self._blocks.own(sequence.tables, index)
            # Also where one cache group had a block and the next had none.
            if any(old is not new for old, new in zip(before, sequence.tables, strict=True)):
                sequence.num_proven = min(sequence.num_proven, sequence.num_planned - offset)
                self._relying[sequence] = None
            if not is_owner:
                return False
            del self._forked[sequence]
        return True

    def writers(self, plan: Plan, prompts: list[Sequence]) -> list[Sequence]:
        """Those of `prompts` that compute blocks in this step: of several that hold the same next block the first.

        What has been launched since they were set back, for one of them or for somebody else, all of them have.
        """
        width = self._blocks.tokens_per_block
        writers: dict[int, Sequence] = {}
        for sequence in prompts:
            first, end = sequence.num_planned // width, (len(sequence.token_ids) - 1) // width
            num_present = self._blocks.num_present(sequence.tables, first, end)
            if num_present and not sequence.num_in_flight and sequence.prompt_logprobs is None:
                sequence.num_planned = sequence.num_computed = (first + num_present) * width
                sequence.num_registered_blocks = first + num_present
                plan.relying.append(sequence)
            writers.setdefault(sequence.tables[0][sequence.num_planned // width], sequence)
        return list(writers.values())

    def set_back(self, sequence: Sequence) -> bool:
        """A step of `sequence`, or one that it relies on, has failed: only what is proven counts, and the rest is
        computed again in the same blocks.

        False if it can't go on: an import that lacks a copied prefix, an export of which the transceiver may have sent
        what was computed over a copy that was never made, or one that has given up the window before what is proven.
        """
        if sequence.state is not SequenceState.RUNNING:
            return sequence.state is not SequenceState.AWAITING_KV
        proven = sequence.num_proven
        if sequence.export_key is not None and sequence.prefix_is_copied and sequence.num_computed > proven:
            return False
        sequence.set_back(self._blocks.tokens_per_block)
        return self._blocks.can_compute_from(sequence.tables, proven)

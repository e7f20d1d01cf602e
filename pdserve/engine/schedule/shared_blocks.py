"""Blocks that several sequences hold: what happens when one of them writes to such a block, or when a step fails.

The scheduler and the step pipeline call it. It owns two sets: sequences that have forked since the last planned step,
and sequences part of whose KV is still to be copied.

One sequence computes a full block. Other sequences with the same tokens up to there hold the block from the moment in
which that step is launched, and read it in later steps, which the device runs afterwards. If the step fails, the block
holds nothing. Then the first of its holders that takes part in a step computes it again, for all of them.
"""

from __future__ import annotations

from pdserve.engine.schedule.kv_cache import KvCache
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.sequence import Sequence, SequenceState


class SharedBlocks:
    """The rules of sharing, over the blocks of one engine."""

    def __init__(self, blocks: KvCache) -> None:
        self._blocks = blocks
        self._forked: dict[Sequence, None] = {}
        self._relying: dict[Sequence, None] = {}

    def launched(self, step: PlannedStep) -> None:
        """`step` was launched: offer the full blocks of prompts that it computes to later steps, as pending."""
        width = self._blocks.tokens_per_block
        for sequence, _ in step.chunks():
            first, end = sequence.num_registered_blocks, sequence.num_planned // width
            if end > first:
                self._blocks.register(sequence.hashes, sequence.tables, first, end, pending=True)
                sequence.num_registered_blocks = end

    def succeeded(self, step: PlannedStep) -> None:
        """`step` was collected without an error: the blocks that it computed are no longer pending."""
        for sequence, item in step.chunks():
            self._blocks.settle(sequence.tables, item.start + len(item.token_ids))

    def failed(self, step: PlannedStep) -> None:
        """`step` has failed after its launch. Forget its copies, and offer the blocks that it should have computed to
        nobody."""
        self.not_copied(step)
        for sequence, item in step.chunks():
            self._blocks.void(sequence.tables, item.start + len(item.token_ids))

    def not_copied(self, step: PlannedStep) -> None:
        """The copies of `step` may not have been made: forget what they should have written to host memory."""
        self._blocks.groups[0].host.forget(copy.target for copy in step.copies if copy.kind == "offload")

    def forked(self, sequence: Sequence, child: Sequence) -> None:
        """`sequence` and `child` hold the same blocks, and both will write to the last one."""
        self._forked[sequence] = self._forked[child] = None

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has left every queue: drop it from both sets."""
        self._forked.pop(sequence, None)
        self._relying.pop(sequence, None)

    def planned(self, step: PlannedStep) -> None:
        """`step` has taken all copies decided on so far: the sequences that wait for them rely on `step`."""
        step.relying.extend(self._relying)
        self._relying.clear()

    def own_blocks(self) -> bool:
        """Give each forked sequence a block of its own to write to. Returns False if the blocks do not suffice; those
        that got none stay in the set."""
        # A sequence with a step in flight comes last and so keeps the original: its proven KV must depend on no copy.
        for sequence in sorted(self._forked, key=lambda each: each.num_in_flight):
            index, offset = divmod(sequence.num_planned, self._blocks.tokens_per_block)
            before = list(sequence.tables)
            is_owner = not offset or self._blocks.own(sequence.tables, index)
            # Some groups may have changed their table before another one had no block left.
            if any(old is not new for old, new in zip(before, sequence.tables, strict=True)):
                sequence.num_proven = min(sequence.num_proven, sequence.num_planned - offset)
                self._relying[sequence] = None
            if not is_owner:
                return False
            del self._forked[sequence]
        return True

    def writers(self, step: PlannedStep, prompts: list[Sequence]) -> list[Sequence]:
        """Those of `prompts` that compute something in `step`. Of several that hold the same next block, the first
        does.

        A prompt whose next blocks another sequence has launched meanwhile goes on behind them, and relies on `step`.
        """
        width = self._blocks.tokens_per_block
        writers: dict[int, Sequence] = {}
        for sequence in prompts:
            first, end = sequence.num_planned // width, (len(sequence.token_ids) - 1) // width
            num_present = self._blocks.num_present(sequence.tables, first, end)
            if num_present and not sequence.num_in_flight and sequence.prompt_logprobs is None:
                sequence.num_planned = sequence.num_computed = (first + num_present) * width
                sequence.num_registered_blocks = first + num_present
                step.relying.append(sequence)
            writers.setdefault(sequence.tables[0][sequence.num_planned // width], sequence)
        return list(writers.values())

    def set_back(self, sequence: Sequence) -> bool:
        """A step of `sequence`, or one that it relies on, has failed: count only what is proven. The rest is computed
        again in the same blocks.

        Returns False if the sequence can't go on, in three cases: it is an import whose prefix was to be copied; it is
        an export, and the transceiver may have sent KV that was computed over a copy which was never made; or it has
        given back window blocks that computing from the proven tokens on would need.
        """
        if sequence.state is not SequenceState.RUNNING:
            return sequence.state is not SequenceState.AWAITING_KV
        proven = sequence.num_proven
        if sequence.export_key is not None and sequence.prefix_is_copied and sequence.num_computed > proven:
            return False
        sequence.set_back(self._blocks.tokens_per_block)
        return self._blocks.can_compute_from(sequence.tables, proven)

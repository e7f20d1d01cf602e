"""Which sequence may have blocks: what it takes to be admitted, and what those who run are promised.

Owns the number of blocks that admitted sequences may still ask for, and sets up a sequence's table; the blocks
themselves are the block manager's, the queues the scheduler's.

Under GUARANTEED_NO_EVICT and STATIC_BATCH a sequence is admitted only if there are blocks for all of it beside what is
promised to others, so `extend` never fails. Under MAX_UTILIZATION there must be blocks for its tokens so far, and, if
somebody runs, a few more, so that it is not preempted at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.engine.schedule.block_manager import BlockManager, BrokenInvariant, Match
from pdserve.engine.schedule.sequence import Sequence

_WATERMARK = 0.01


class Capacity:
    """`guaranteed`: whether admitted sequences are promised all blocks that they may need."""

    def __init__(self, blocks: BlockManager, guaranteed: bool) -> None:
        self._blocks = blocks
        self._guaranteed = guaranteed
        self._promised_blocks = 0
        self._watermark_blocks = max(1, int(blocks.num_blocks * _WATERMARK))

    def present(self, sequence: Sequence, only_whole_blocks: bool = False) -> Match:
        """What is present of `sequence`'s prefix. Its last token is always computed, for its logits."""
        num_tokens = 0 if sequence.prompt_logprobs is not None else len(sequence.token_ids) - 1
        return self._blocks.match(sequence.hashes, num_tokens, only_whole_blocks)

    def wanted_blocks(self, sequence: Sequence) -> int:
        """Blocks without which `sequence` is not admitted."""
        return self._final_blocks(sequence) if self._guaranteed else self._blocks.blocks_for(len(sequence.token_ids))

    def admit(
        self, sequence: Sequence, match: Match, *, reserved: bool = False, kept_blocks: int = 0, alone: bool = False
    ) -> bool:
        """Give `sequence` its table, beginning with what `match` found; False if there are not enough blocks.

        Args:
            reserved: an import is to fill the table.
            kept_blocks: blocks to leave for somebody else.
            alone: nobody runs.
        """
        num_blocks, width = self._blocks.blocks_for(len(sequence.token_ids)), self._blocks.tokens_per_block
        if self._guaranteed:
            kept_blocks += self._promised_blocks + self._final_blocks(sequence) - num_blocks
        elif not alone:
            kept_blocks += self._watermark_blocks
        table = self._blocks.allocate(num_blocks, match, headroom=kept_blocks, reserved=reserved)
        if table is None and match.num_partial_tokens:
            match = match.whole_blocks()
            table = self._blocks.allocate(num_blocks, match, headroom=kept_blocks, reserved=reserved)
        if table is None:
            return False
        sequence.tables = [table]
        sequence.num_registered_blocks = len(match.shared)
        sequence.num_proven = len(match.shared) * width
        sequence.num_computed = sequence.num_planned = match.num_blocks * width + match.num_partial_tokens
        self._promised_blocks += self._final_blocks(sequence) - num_blocks
        return True

    def lend(self, sequence: Sequence, reserved: bool = False) -> bool:
        """Give `sequence` blocks that hold nothing, for KV that nobody will read; False if that could harm others.

        It could if cached prefixes had to go (unless the request says that they may), or if fewer blocks were left than
        it takes, beside all that is promised.
        """
        num_blocks = self._blocks.blocks_for(len(sequence.token_ids))
        if num_blocks > self._blocks.counts().free and not sequence.request.evict:
            return False
        table = self._blocks.allocate(num_blocks, headroom=self._promised_blocks + num_blocks, reserved=reserved)
        sequence.tables = [table or []]
        return table is not None

    def extend(self, sequence: Sequence) -> bool:
        """Append a block to the table of an admitted sequence; False if there is none."""
        if not self._blocks.extend(sequence.tables[0]):
            return False
        self._promised_blocks -= 1
        return True

    def retire(self, sequence: Sequence) -> None:
        """An admitted sequence asks for no more blocks; those it has stay its own."""
        self._promised_blocks -= self._final_blocks(sequence) - len(sequence.tables[0])

    def check(self, admitted: Iterable[Sequence]) -> None:
        """Recompute what is promised from all admitted sequences. Raises `BrokenInvariant`."""
        needed = sum(self._final_blocks(each) - len(each.tables[0]) for each in admitted)
        promised, available = self._promised_blocks, self._blocks.available
        if needed != promised or (self._guaranteed and needed > available):
            raise BrokenInvariant(f"{promised} blocks are promised, {needed} may be needed, {available} are available")

    def _final_blocks(self, sequence: Sequence) -> int:
        """Blocks of `sequence` if it gets as long as it may. Its last token's KV is never needed."""
        return self._blocks.blocks_for(sequence.plan_limit_tokens - 1)

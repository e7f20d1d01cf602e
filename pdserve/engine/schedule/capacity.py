"""The capacity policies: when a sequence is admitted, and how many blocks admitted sequences are promised.

The scheduler calls it. Owns the number of promised blocks, and fills a sequence's tables at admission. `KvCache` has
the blocks, the scheduler the queues. All numbers of blocks hold for each cache group.

Under GUARANTEED_NO_EVICT and STATIC_BATCH a sequence is admitted only if there are blocks for its greatest length,
beside all that is promised to others. So `extend` never fails. A window group promises as many blocks as a full one.
Under MAX_UTILIZATION there need only be blocks for the tokens that the sequence has; while another sequence runs, a few
more must be left (the watermark), so that the new one is not preempted at once.
"""

from __future__ import annotations

from collections.abc import Iterable

from pdserve.engine.schedule.block_manager import BrokenInvariant
from pdserve.engine.schedule.kv_cache import KvCache, Present
from pdserve.engine.schedule.sequence import Sequence

_WATERMARK = 0.01


class Capacity:
    """`guaranteed`: whether admitted sequences are promised all blocks that they may need."""

    def __init__(self, blocks: KvCache, guaranteed: bool) -> None:
        self._blocks = blocks
        self.guaranteed = guaranteed
        self._promised_blocks = 0
        self._watermark_blocks = max(1, int(blocks.num_blocks * _WATERMARK))

    def present(self, sequence: Sequence, imports: bool = False) -> Present:
        """Find what the cache holds of `sequence`. Its last token is never counted: it is computed for its logits.

        Args:
            imports: a peer sends the rest; nothing is computed here.
        """
        num_tokens = 0 if sequence.prompt_logprobs is not None else len(sequence.token_ids) - 1
        return self._blocks.match(sequence.hashes, num_tokens, len(sequence.token_ids) if imports else 0)

    def wanted_blocks(self, sequence: Sequence) -> int:
        """Blocks that `sequence` needs to be admitted."""
        return self._final_blocks(sequence) if self.guaranteed else self._blocks.blocks_for(len(sequence.token_ids))

    def admit(
        self, sequence: Sequence, present: Present, *, reserved: bool = False, kept_blocks: int = 0, alone: bool = False
    ) -> bool:
        """Give `sequence` its tables, beginning with what is `present`; False if there are not enough blocks.

        Args:
            reserved: an import is to fill the tables.
            kept_blocks: blocks to leave for another sequence.
            alone: whether no sequence runs.
        """
        num_blocks, width = self._blocks.blocks_for(len(sequence.token_ids)), self._blocks.tokens_per_block
        if self.guaranteed:
            kept_blocks += self._promised_blocks + self._final_blocks(sequence) - num_blocks
        elif not alone:
            kept_blocks += self._watermark_blocks
        tables = self._blocks.allocate(num_blocks, present, headroom=kept_blocks, reserved=reserved)
        if tables is None and present.num_partial_tokens:
            present = present.whole_blocks()
            tables = self._blocks.allocate(num_blocks, present, headroom=kept_blocks, reserved=reserved)
        if tables is None:
            return False
        sequence.tables = tables
        sequence.num_registered_blocks = present.num_shared_blocks
        sequence.num_proven = present.num_proven_blocks * width
        sequence.prefix_is_copied = present.is_copied
        sequence.num_computed = sequence.num_planned = present.num_blocks * width + present.num_partial_tokens
        self._promised_blocks += self._final_blocks(sequence) - num_blocks
        return True

    def lend(self, sequence: Sequence, reserved: bool = False) -> bool:
        """Give blocks to `sequence`, whose KV is only moved and never read. Returns False if others could miss them.

        That is so if cached blocks would have to be evicted, unless the request allows it; or if fewer blocks would be
        left, beside the promised ones, than it takes.
        """
        num_tokens = len(sequence.token_ids)
        num_blocks = self._blocks.blocks_for(num_tokens)
        if num_blocks > self._blocks.num_free and not sequence.request.evict:
            return False
        nothing, headroom = self._blocks.nothing(num_tokens), self._promised_blocks + num_blocks
        tables = self._blocks.allocate(num_blocks, nothing, headroom=headroom, reserved=reserved)
        if tables is None:
            return False
        sequence.tables = tables
        return True

    def extend(self, sequence: Sequence) -> bool:
        """Append a block to the tables of an admitted sequence; False if there is none."""
        if not self._blocks.extend(sequence.tables):
            return False
        self._promised_blocks -= 1
        return True

    def fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Give `child` the blocks of `sequence` that hold computed tokens; False if there are too few for the rest."""
        num_blocks = self._blocks.blocks_for(sequence.num_computed)
        promised_blocks = self._promised_blocks + self._final_blocks(child) - num_blocks
        # One block may have to be copied.
        if self.guaranteed and promised_blocks + 1 > self._blocks.available:
            return False
        child.tables = self._blocks.fork(sequence.tables, sequence.num_computed)
        self._promised_blocks = promised_blocks
        return True

    def room(self, sequence: Sequence, num_tokens: int, spare_blocks: int) -> int:
        """Append blocks to the tables of an admitted sequence until they hold `num_tokens` tokens, but at most
        `spare_blocks`. Returns how many tokens they hold then."""
        num_missing = self._blocks.blocks_for(num_tokens) - len(sequence.tables[0])
        for _ in range(min(num_missing, spare_blocks)):
            if not self.extend(sequence):
                break
        return len(sequence.tables[0]) * self._blocks.tokens_per_block

    def rewind(self, sequence: Sequence) -> None:
        """Give back the blocks at the end of an admitted sequence's tables that none of its planned tokens needs.

        Its tables are new list objects afterwards. Whoever keeps an old one can tell by that that it has not just
        grown.
        """
        num_blocks = self._blocks.blocks_for(sequence.num_planned)
        num_surplus = len(sequence.tables[0]) - num_blocks
        if num_surplus > 0:
            self._blocks.release([table[num_blocks:] for table in sequence.tables])
            sequence.tables = [table[:num_blocks] for table in sequence.tables]
            self._promised_blocks += num_surplus

    def retire(self, sequence: Sequence) -> None:
        """Promise no more blocks to an admitted sequence, which leaves the running set. It keeps those that it has."""
        self._promised_blocks -= self._final_blocks(sequence) - len(sequence.tables[0])

    def check(self, admitted: Iterable[Sequence]) -> None:
        """Recompute what is promised from all admitted sequences. Raises `BrokenInvariant`."""
        needed = sum(self._final_blocks(each) - len(each.tables[0]) for each in admitted)
        promised, available = self._promised_blocks, self._blocks.available
        if needed != promised or (self.guaranteed and needed > available):
            raise BrokenInvariant(f"{promised} blocks are promised, {needed} may be needed, {available} are available")

    def _final_blocks(self, sequence: Sequence) -> int:
        """Blocks of `sequence` if it gets as long as it may. Its last token's KV is never needed."""
        return self._blocks.blocks_for(sequence.plan_limit_tokens - 1)

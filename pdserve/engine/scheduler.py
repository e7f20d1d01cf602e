"""Which sequences take part in the next step, and with how many tokens.

Owns the waiting queue, the running set and the queue of offered imports, and moves blocks between them and the block
manager. Doesn't run anything, answers nobody and speaks to no mover: the engine does, by what a `Plan` says.

In-flight batching: every running sequence that decodes gets its token first; what is left of `max_num_tokens` goes
to prompts in order of arrival, in chunks. A sequence is admitted only when blocks for its whole prompt are available,
so only decoding ever runs out of blocks. It then preempts the latest arrival (possibly itself), whose tokens are kept
and whose KV is computed again later. Sequences being exported hold their blocks until the mover is done; that is the
back-pressure of a context worker.

A step may be planned while the one before it still runs: a decode's token is then named by its place in that step. What
can't be planned without that step's tokens (a preemption, a penalty over the history) must wait for them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from pdserve.engine.batch import BatchItem
from pdserve.engine.block_manager import BlockManager
from pdserve.engine.sequence import Sequence, SequenceState
from pdserve.protocol import EngineLimits

_WATERMARK = 0.01


class Plan:
    """One step: `items[i]` is the share of `sequences[i]`.

    `admitted` were taken from the waiting queue, `accepted` from the offered imports: the engine must tell the mover.
    """

    __slots__ = ("accepted", "admitted", "budget_tokens", "items", "num_prefill_tokens", "sequences")

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.sequences: list[Sequence] = []
        self.items: list[BatchItem] = []
        self.admitted: list[Sequence] = []
        self.accepted: list[Sequence] = []
        self.num_prefill_tokens = 0

    def __repr__(self) -> str:
        return f"a step of {', '.join(str(each.key) for each in self.sequences)}"


class Scheduler:
    """Queues, and the plan of each step. `limits` are the runner's."""

    def __init__(self, blocks: BlockManager, limits: EngineLimits, enable_chunked_prefill: bool) -> None:
        self.blocks = blocks
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.offered: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}
        self.receiving: dict[Sequence, None] = {}
        self.num_preemptions = 0
        self._limits = limits
        self._chunked = enable_chunked_prefill
        self._watermark_blocks = max(1, int(blocks.num_blocks * _WATERMARK))

    def plan(self, ahead: bool = False) -> Plan | None:
        """The next step; the sequences in it stay in the running set. The caller launches it and calls `launched`.

        Args:
            ahead: the step before is not collected yet. None is returned if planning has to wait for it.
        """
        plan = Plan(self._limits.max_num_tokens)
        prefilling = self._try_decodes(plan)
        while prefilling is None:
            if ahead:
                return None
            self._preempt(self._victim())
            plan = Plan(self._limits.max_num_tokens)
            prefilling = self._try_decodes(plan)
        for sequence in prefilling:
            if not plan.budget_tokens:
                break
            self._plan_chunk(plan, sequence)
        self._admit(plan)
        return plan

    def launched(self, plan: Plan) -> None:
        """The step of `plan` is on its way: later plans build on it."""
        for row, (sequence, item) in enumerate(zip(plan.sequences, plan.items, strict=True)):
            sequence.num_planned += len(item.token_ids)
            sequence.num_pending += item.sample
            sequence.num_in_flight += 1
            sequence.row = row

    def collected(self, sequence: Sequence, item: BatchItem) -> None:
        """The step of `item` is over; `advance` follows unless `sequence` has ended meanwhile."""
        sequence.num_pending -= item.sample
        sequence.num_in_flight -= 1

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """KV of `num_tokens` more tokens of `sequence` is computed; full blocks may be reused from now on."""
        sequence.num_computed += num_tokens
        full_blocks = sequence.num_computed // self.blocks.tokens_per_block
        if full_blocks > sequence.num_registered_blocks:
            self.blocks.register(sequence.hashes, sequence.block_ids, sequence.num_registered_blocks, full_blocks)
            sequence.num_registered_blocks = full_blocks

    def received(self, sequence: Sequence, first_token: int) -> None:
        """An import is complete: `sequence` joins the running set with `first_token`."""
        del self.receiving[sequence]
        self.blocks.commit(sequence.block_ids)
        num_tokens = len(sequence.token_ids)
        sequence.append(first_token)
        sequence.num_planned = num_tokens
        self.advance(sequence, num_tokens - sequence.num_computed)
        sequence.move_to(SequenceState.RUNNING)
        self.running[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out of every queue; its blocks stay its own until `release`."""
        self.waiting.pop(sequence, None)
        self.offered.pop(sequence, None)
        self.running.pop(sequence, None)
        self.receiving.pop(sequence, None)

    def release(self, sequence: Sequence) -> None:
        """Give the blocks of `sequence` back. What is registered stays reusable."""
        self.blocks.release(sequence.block_ids)
        sequence.block_ids = []

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Compare the books with `sequences`, all that the engine still knows. Raises `BrokenInvariant`."""
        self.blocks.check([sequence.block_ids for sequence in sequences])

    def _try_decodes(self, plan: Plan) -> list[Sequence] | None:
        """Give each decoding sequence its token, and return those whose prompt is still being computed.

        None if a sequence found no block for its token, or must know the token before it.
        """
        prefilling: list[Sequence] = []
        width = self.blocks.tokens_per_block
        sequences, items = plan.sequences, plan.items
        for sequence in self.running:
            planned, pending = sequence.num_planned, sequence.num_pending
            num_tokens = len(sequence.token_ids) + pending
            if num_tokens - planned != 1:
                prefilling.append(sequence)
                continue
            if num_tokens >= sequence.plan_limit_tokens:
                continue
            if len(items) == plan.budget_tokens:
                break
            block_ids = sequence.block_ids
            if len(block_ids) * width == planned and not self.blocks.extend(block_ids):
                return None
            if pending and sequence.needs_history:
                return None
            sequences.append(sequence)
            # Positional: this line runs once per sequence and step, and keywords cost a tenth of a microsecond each.
            items.append(
                BatchItem(
                    sequence.token_ids[-1:],
                    planned,
                    block_ids,
                    True,
                    sequence.sampling,
                    sequence.prompt_ids,
                    sequence.output_ids,
                    None,
                    False,
                    sequence.row if pending else None,
                )
            )
        plan.budget_tokens -= len(items)
        return prefilling

    def _victim(self) -> Sequence:
        # One that exports has blocks for all it needs, so whoever ran out of them is itself among the candidates.
        return max((each for each in self.running if not each.exports), key=lambda each: each.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.release(sequence)
        sequence.reset()
        sequence.move_to(SequenceState.WAITING)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.num_preemptions += 1

    def _plan_chunk(self, plan: Plan, sequence: Sequence) -> None:
        start = sequence.num_planned
        end = min(len(sequence.token_ids), start + plan.budget_tokens)
        wants_logprobs = sequence.prompt_logprobs is not None
        plan.sequences.append(sequence)
        plan.items.append(
            BatchItem(
                token_ids=sequence.token_ids[start:end],
                start=start,
                block_ids=sequence.block_ids,
                sample=end == len(sequence.token_ids),
                sampling=sequence.sampling,
                prompt_ids=sequence.prompt_ids,
                output_ids=sequence.output_ids,
                next_prompt_token=sequence.prompt_ids[end] if end < len(sequence.prompt_ids) else None,
                want_prompt_logprobs=wants_logprobs,
            )
        )
        plan.budget_tokens -= end - start
        plan.num_prefill_tokens += end - start

    def _admit(self, plan: Plan) -> None:
        """Oldest first, start waiting prompts and accept offered imports until one lacks blocks or room.

        Nobody overtakes that one: else a large prompt would never find its blocks.
        """
        while len(self.running) + len(self.receiving) < self._limits.max_batch_size:
            sequence = self._next_candidate(plan)
            if sequence is None:
                return
            enter = self._accept_import if sequence.state is SequenceState.AWAITING_KV else self._start_prompt
            if not enter(plan, sequence):
                return

    def _next_candidate(self, plan: Plan) -> Sequence | None:
        # An import needs no share of this step, so offers are looked at even when the step is full.
        # `_accept_import` leaves an older prompt its blocks.
        waiting = next(iter(self.waiting), None) if plan.budget_tokens else None
        offered = next(iter(self.offered), None)
        if waiting is None or offered is None:
            return waiting or offered
        return waiting if waiting.arrival < offered.arrival else offered

    def _start_prompt(self, plan: Plan, sequence: Sequence) -> bool:
        shared = self._reusable(sequence)
        rest = len(sequence.token_ids) - len(shared) * self.blocks.tokens_per_block
        if rest > plan.budget_tokens and not self._may_be_cut(sequence):
            return False
        if not self._allocate(sequence, shared):
            return False
        del self.waiting[sequence]
        sequence.move_to(SequenceState.RUNNING)
        self.running[sequence] = None
        plan.admitted.append(sequence)
        self._plan_chunk(plan, sequence)
        return True

    def _accept_import(self, plan: Plan, sequence: Sequence) -> bool:
        head = next(iter(self.waiting), sequence)
        promised = self.blocks.blocks_for(len(head.token_ids)) if head.arrival < sequence.arrival else 0
        if not self._allocate(sequence, self._reusable(sequence), reserved=True, promised_blocks=promised):
            return False
        del self.offered[sequence]
        sequence.move_to(SequenceState.RECEIVING)
        self.receiving[sequence] = None
        plan.accepted.append(sequence)
        return True

    def _may_be_cut(self, sequence: Sequence) -> bool:
        """Whether a prompt may be computed in several steps.

        Without chunked prefill only one that can't be computed otherwise: it has grown by its own output and is now
        computed again.
        """
        return self._chunked or len(sequence.token_ids) > self._limits.max_num_tokens

    def _reusable(self, sequence: Sequence) -> list[int]:
        """Blocks of `sequence`'s prefix that are present. Its last token is always computed, for its logits."""
        if sequence.prompt_logprobs is not None:
            return []
        return self.blocks.match_prefix(sequence.hashes, (len(sequence.token_ids) - 1) // self.blocks.tokens_per_block)

    def _allocate(
        self, sequence: Sequence, shared: list[int], *, reserved: bool = False, promised_blocks: int = 0
    ) -> bool:
        """Give `sequence` its table, leaving `promised_blocks` and, for those who run, the watermark."""
        fresh = self.blocks.blocks_for(len(sequence.token_ids)) - len(shared)
        headroom = promised_blocks + (self._watermark_blocks if self.running else 0)
        table = self.blocks.allocate(fresh, shared=shared, headroom=headroom, reserved=reserved)
        if table is None:
            return False
        sequence.block_ids = table
        sequence.num_registered_blocks = len(shared)
        sequence.num_computed = sequence.num_planned = len(shared) * self.blocks.tokens_per_block
        return True

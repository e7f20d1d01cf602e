"""Which sequences take part in the next step, and with how many tokens.

The engine calls it. It owns the waiting queue, the running set and the queue of offered imports, and gives sequences
their blocks. It runs nothing, answers no client and does not speak to the transceiver: the engine does that, as the
`PlannedStep` says.

Order within a step:

- Every running sequence that decodes gets its next token first.
- Prompts share what is left of `max_num_tokens`, oldest first or equally, in chunks. Where a sequence decodes, or an
  import is under way, they get at most `max_mixed_prefill_tokens`.
- A prompt that needs half a step or more waits until the prompts before it are computed: together with it, their first
  tokens would come much later.

Admission: the oldest waiting prompt starts when the capacity policy allows it (`capacity`), and no younger one
overtakes it. A policy that promises no blocks for output may leave a decode without one. Then the sequence that arrived
last is preempted: it loses its blocks, keeps its tokens, waits, and is computed again. With STATIC_BATCH no sequence is
admitted while another one runs. A sequence that is being exported holds its blocks until the transceiver is done; this
holds back further prompts on a context worker.

Prompts that begin alike are computed once. Blocks are offered for reuse as soon as the step that computes them is
launched; a prompt whose next tokens another prompt computes in the step that is being planned starts with the step
after it (`PromptShares.is_early`). What happens to such blocks when a step fails is `shared_blocks`' business.

Planning ahead: a step may be planned while the one before it runs. A decode then names its token by its place in that
step. Three things need the tokens themselves, so they wait for that step: a preemption, a penalty over the history, and
drafts.

Drafts: with a drafter, a decode computes its newest token and the drafts after it, as far as the step has room and
blocks are to spare. `advance` takes back the drafts that were not drawn, and the blocks that only they needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from pdserve.engine.schedule.batch import BatchItem
from pdserve.engine.schedule.capacity import Capacity
from pdserve.engine.schedule.drafts import Drafter
from pdserve.engine.schedule.kv_cache import KvCache, Present
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.prompts import PromptShares
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.engine.schedule.shared_blocks import SharedBlocks
from pdserve.protocol import EngineLimits

REGISTERED_AT_ONCE = 256
"""Blocks of an import that are offered for reuse in one step: they take 1.5 ms of the engine's thread."""


class Scheduler:
    """See the module.

    Attributes:
        waiting: prompts without blocks, oldest first.
        offered: imports that the peer has offered and that have no blocks yet, oldest first.
        running: sequences that compute prompts or decode.
        receiving: imports that have blocks and whose KV is under way.
        borrowing: imports of requests that only move KV, whose blocks the transceiver has not been told of yet.
    """

    def __init__(self, blocks: KvCache, limits: EngineLimits, options: EngineOptions) -> None:
        self.blocks = blocks
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.offered: OrderedDict[Sequence, None] = OrderedDict()
        self.running: dict[Sequence, None] = {}
        self.receiving: dict[Sequence, None] = {}
        self.borrowing: dict[Sequence, None] = {}
        self.num_preemptions = 0
        self.sharing = SharedBlocks(blocks)
        self._limits = limits
        self._max_mixed_prefill_tokens = options.max_mixed_prefill_tokens or limits.max_num_tokens
        self._static = options.capacity_policy == "STATIC_BATCH"
        self._prompts = PromptShares(self.sharing, limits, options)
        self._drafter, self._max_drafts = options.drafter, options.max_drafts
        self._capacity = Capacity(blocks, guaranteed=options.capacity_policy != "MAX_UTILIZATION")

    def plan(
        self, ahead: bool = False, start_prompts: bool = True, only: Collection[Sequence] | None = None
    ) -> PlannedStep | None:
        """Plan the next step. The caller launches it and calls `launched`.

        Args:
            ahead: the step before is not collected yet.
            start_prompts: whether prompts may leave the waiting queue.
            only: the running sequences that may take part; none is admitted then. None: all of them.

        Returns:
            The step, which may be empty; None if planning has to wait for the step before.
        """
        step = PlannedStep(self._limits.max_num_tokens)
        prompts = self._try_decodes(step, only)
        while prompts is None:
            if ahead:
                return None
            self._preempt(self._victim())
            step = PlannedStep(self._limits.max_num_tokens)
            prompts = self._try_decodes(step, only)
        if step.num_decode_tokens or self.offered or self.receiving:
            step.budget_tokens = min(step.budget_tokens, self._max_mixed_prefill_tokens)
        if only is None:
            self._admit(step, prompts, start_prompts)
        self._prompts.share_out(step, prompts)
        step.copies = self.blocks.take_copies()
        step.accepted.extend(self.borrowing)
        self.borrowing.clear()
        self.sharing.planned(step)
        return step

    def lend(self, sequence: Sequence) -> bool:
        """Give blocks out of turn to `sequence`, whose request only moves KV. Returns False if others could miss them.

        An import is among the `accepted` of the next planned step.
        """
        imports = sequence.state is SequenceState.AWAITING_KV
        if not self._capacity.lend(sequence, reserved=imports):
            return False
        if imports:
            self.borrowing[sequence] = None
        return True

    def launched(self, step: PlannedStep) -> None:
        """`step` was launched: the steps planned from now on build on it."""
        for row, (sequence, item) in enumerate(zip(step.sequences, step.items, strict=True)):
            sequence.num_planned += len(item.token_ids)
            sequence.num_pending += item.num_sampled
            sequence.num_in_flight += 1
            sequence.row = row
        self.sharing.launched(step)

    def collected(self, sequence: Sequence, item: BatchItem) -> None:
        """A step that had `item` of `sequence` is over. `advance` follows unless the sequence has ended meanwhile."""
        sequence.num_pending -= item.num_sampled
        sequence.num_in_flight -= 1

    def advance(self, sequence: Sequence, computed: int, accepted: int) -> None:
        """A step has succeeded. Count its tokens, offer full blocks for reuse, and give back blocks before a window.

        Args:
            computed: tokens of `sequence` that the step computed.
            accepted: how many of them, from the first, belong to the sequence. The others were drafts that were not
                drawn.
        """
        sequence.num_computed += accepted
        sequence.num_proven = sequence.num_computed
        if accepted != computed:
            sequence.num_planned -= computed - accepted
            self._capacity.rewind(sequence)
        full_blocks = sequence.num_computed // self.blocks.tokens_per_block
        if full_blocks > sequence.num_registered_blocks:
            self._register(sequence, full_blocks, computed)
        if self.blocks.has_windows:
            self.blocks.slide(sequence.tables, sequence.num_computed)

    def _register(self, sequence: Sequence, full_blocks: int, num_computed: int) -> None:
        """Offer the first `full_blocks` blocks of the sequence for reuse, as far as this step has time.

        Every sequence's next token waits meanwhile, so a long imported prompt is registered over several steps:
        `REGISTERED_AT_ONCE` blocks at a time, or as many as the step's `num_computed` tokens fill. Blocks that have not
        had their turn when the sequence ends are not reused.
        """
        first = sequence.num_registered_blocks
        at_once = max(REGISTERED_AT_ONCE, num_computed // self.blocks.tokens_per_block + 1)
        end = min(full_blocks, first + at_once)
        self.blocks.register(sequence.hashes, sequence.tables, first, end)
        sequence.num_registered_blocks = end

    def received(self, sequence: Sequence, first_token: int) -> None:
        """All KV of an import is in its blocks: `sequence` runs from now on. The peer has sampled `first_token`."""
        del self.receiving[sequence]
        self.blocks.commit(sequence.tables)
        num_tokens = len(sequence.token_ids)
        sequence.append(first_token)
        # The context worker tells the client this token.
        sequence.num_told += 1
        sequence.num_planned = num_tokens
        sequence.num_computed = sequence.num_proven = num_tokens
        self._register(sequence, num_tokens // self.blocks.tokens_per_block, 0)
        sequence.move_to(SequenceState.RUNNING)
        self.running[sequence] = None

    def remove(self, sequence: Sequence) -> None:
        """Take `sequence` out of every queue; its blocks stay its own until `release`."""
        if sequence in self.running or sequence in self.receiving:
            self._capacity.retire(sequence)
        self.waiting.pop(sequence, None)
        self.offered.pop(sequence, None)
        self.running.pop(sequence, None)
        self.receiving.pop(sequence, None)
        self.borrowing.pop(sequence, None)
        self.sharing.forget(sequence)

    def release(self, sequence: Sequence) -> None:
        """Give the blocks of `sequence` back. Registered blocks stay in the prefix cache."""
        if sequence.num_registered_blocks == sequence.num_proven // self.blocks.tokens_per_block:
            self.blocks.register_tail(sequence.hashes, sequence.tables, sequence.num_proven)
        self.blocks.release(sequence.tables)
        sequence.tables = [[] for _ in sequence.tables]

    def fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Let `child` go on from the KV of `sequence`. Returns False if there is no room for it.

        Args:
            sequence: it decodes.
            child: a new sequence with the same tokens. Whichever of the two writes first to a block that both hold gets
                a copy of it.
        """
        num_running = len(self.running) + len(self.receiving)
        if num_running == self._limits.max_batch_size or not self._capacity.fork(sequence, child):
            return False
        child.num_computed = child.num_planned = sequence.num_computed
        child.num_proven, child.num_registered_blocks = sequence.num_proven, sequence.num_registered_blocks
        child.move_to(SequenceState.RUNNING)
        self.running[child] = None
        self.sharing.forked(sequence, child)
        if self._capacity.guaranteed:
            # Before the next step is planned, the block for the copy might be promised to another sequence.
            self.sharing.own_blocks()
        return True

    def checks(self, sequences: Iterable[Sequence]) -> Iterator[None]:
        """Compare the counts of blocks with `sequences`, which are all that the engine knows. Each `next` does a slice
        of the work; nothing may change in between. Raises `BrokenInvariant`."""
        yield from self.blocks.checks([sequence.tables for sequence in sequences])
        self._capacity.check((*self.running, *self.receiving))

    def _try_decodes(self, step: PlannedStep, only: Collection[Sequence] | None) -> list[Sequence] | None:
        """Add the next token of each decoding sequence to `step`.

        Returns the running sequences whose prompt is not computed yet; None if a sequence found no block for its token,
        or needs the value of a token that a step in flight samples.
        """
        prefilling: list[Sequence] = []
        if not self.sharing.own_blocks():
            return None
        width, drafter = self.blocks.tokens_per_block, self._drafter
        sequences, items = step.sequences, step.items
        candidates = self.running if only is None else [each for each in only if each in self.running]
        # Half of what the decodes leave is for prompts.
        num_drafts, spare_tokens = 0, (step.budget_tokens - len(candidates)) // 2
        for sequence in candidates:
            planned, pending = sequence.num_planned, sequence.num_pending
            num_tokens = len(sequence.token_ids) + pending
            if num_tokens - planned != 1:
                prefilling.append(sequence)
                continue
            if num_tokens >= sequence.plan_limit_tokens:
                continue
            if len(items) + num_drafts == step.budget_tokens:
                break
            tables = sequence.tables
            if len(tables[0]) * width == planned and not self._capacity.extend(sequence):
                return None
            if pending and (drafter is not None or sequence.needs_history):
                return None
            token_ids, num_sampled = sequence.token_ids[-1:], 1
            if drafter is not None:
                token_ids += self._draft(sequence, drafter, spare_tokens - num_drafts)
                num_sampled = len(token_ids)
                num_drafts += num_sampled - 1
            sequences.append(sequence)
            # Positional: this line runs once per sequence and step, and keywords cost a tenth of a microsecond each.
            items.append(
                BatchItem(
                    token_ids,
                    planned,
                    tables,
                    num_sampled,
                    sequence.sampling,
                    sequence.prompt_ids,
                    sequence.output_ids,
                    None,
                    False,
                    sequence.row if pending else None,
                    sequence.export_key,
                )
            )
        step.num_decode_tokens = len(items)
        step.budget_tokens -= len(items) + num_drafts
        return prefilling

    def _draft(self, sequence: Sequence, drafter: Drafter, spare_tokens: int) -> list[int]:
        """Drafts of what follows a decode, whose own token has its block already; appends the blocks that they need.

        There are at most `spare_tokens` of them, and no more than the sequence may still get after its next token.
        """
        num_tokens = len(sequence.token_ids)
        most = min(self._max_drafts, spare_tokens, sequence.plan_limit_tokens - num_tokens - 1)
        drafts = drafter.propose(sequence.token_ids, most) if most > 0 else []
        # A draft takes no block that another sequence needs: one that waits, or another decode of this step.
        spare_blocks = 0 if self.waiting or self.offered else self.blocks.available - len(self.running)
        return drafts[: self._capacity.room(sequence, num_tokens + len(drafts), spare_blocks) - num_tokens]

    def _victim(self) -> Sequence:
        # A sequence with a peer is never preempted. It has all its blocks, so one that ran out is among the candidates.
        return max((each for each in self.running if each.export_key is None), key=lambda each: each.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.release(sequence)
        sequence.reset()
        sequence.move_to(SequenceState.WAITING)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.num_preemptions += 1

    def _admit(self, step: PlannedStep, prompts: list[Sequence], start_prompts: bool) -> None:
        """Start waiting prompts and accept offered imports, oldest first, until one of them lacks blocks or room.

        No younger sequence overtakes that one: otherwise a large prompt would never find its blocks.

        Args:
            prompts: the sequences whose prompts are being computed; those that start now are appended.
        """
        if self._static and (self.running or self.receiving):
            return
        budget_tokens = step.budget_tokens - sum(self._prompts.claim(each) for each in prompts)
        early: list[Sequence] = []
        while len(self.running) + len(self.receiving) + len(early) < self._limits.max_batch_size:
            sequence = self._next_candidate(start_prompts and (budget_tokens > 0 or self._static))
            if sequence is None:
                break
            if sequence.state is SequenceState.AWAITING_KV:
                if not self._accept_import(step, sequence):
                    break
                continue
            present = self._capacity.present(sequence)
            if not self._static and self._prompts.is_early(sequence, present, prompts):
                early.append(sequence)
                del self.waiting[sequence]
            elif self._start_prompt(step, sequence, present, budget_tokens):
                prompts.append(sequence)
                budget_tokens -= self._prompts.claim(sequence)
            else:
                break
        for sequence in reversed(early):
            self.waiting[sequence] = None
            self.waiting.move_to_end(sequence, last=False)

    def _next_candidate(self, start_prompts: bool) -> Sequence | None:
        # An import needs no share of this step, so offers are looked at even when the step is full.
        # `_accept_import` leaves an older prompt its blocks.
        waiting = next(iter(self.waiting), None) if start_prompts else None
        offered = next(iter(self.offered), None)
        if waiting is None or offered is None:
            return waiting or offered
        return waiting if waiting.arrival < offered.arrival else offered

    def _start_prompt(self, step: PlannedStep, sequence: Sequence, present: Present, budget_tokens: int) -> bool:
        num_tokens = present.num_blocks * self.blocks.tokens_per_block + present.num_partial_tokens
        fits = len(sequence.token_ids) - num_tokens <= budget_tokens
        if not (fits or self._static or self._prompts.may_be_cut(sequence)):
            return False
        if not self._capacity.admit(sequence, present, alone=not self.running):
            return False
        del self.waiting[sequence]
        sequence.move_to(SequenceState.RUNNING)
        self.running[sequence] = None
        step.admitted.append(sequence)
        return True

    def _accept_import(self, step: PlannedStep, sequence: Sequence) -> bool:
        """Give the blocks that it needs to an offered import, which stays AWAITING_KV until the transceiver is told.

        Returns False if there are too few, beside those that an older waiting prompt needs.
        """
        head = next(iter(self.waiting), sequence)
        kept_blocks = self._capacity.wanted_blocks(head) if head.arrival < sequence.arrival else 0
        present = self._capacity.present(sequence, imports=True)
        alone = not self.running
        if not self._capacity.admit(sequence, present, reserved=True, kept_blocks=kept_blocks, alone=alone):
            return False
        del self.offered[sequence]
        self.receiving[sequence] = None
        step.accepted.append(sequence)
        return True

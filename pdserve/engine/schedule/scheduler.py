"""Which sequences take part in the next step, and with how many tokens.

Owns the waiting queue, the running set and the queue of offered imports, and moves blocks between them and the block
manager. Doesn't run anything, answers nobody and speaks to no transceiver: the engine does, by what a `Plan` says.

In-flight batching: every running sequence that decodes gets its token first; what is left of `max_num_tokens` goes to
prompts in chunks, oldest first or equally, but at most `max_mixed_prefill_tokens` where anybody decodes, or is about
to, with KV under way. A prompt that fills half a step is not computed together with those before it, whose first token
would be that much later. Nobody overtakes the oldest that waits, which is admitted when the capacity policy allows (see
`capacity`). Where that promises no blocks for output, a decode that finds none preempts the latest arrival (possibly
itself), whose tokens are kept and whose KV is computed again later. With STATIC_BATCH nobody is admitted while somebody
runs. Sequences being exported hold their blocks until the transceiver is done; that is the back-pressure of a context
worker.

Prompts that begin alike are computed once: blocks are offered for reuse as soon as the step that computes them is
launched, and a prompt whose next tokens are in the step that is being planned waits for the one after it. After a
failed step several sequences may hold a block with nothing in it: the first of them in a step computes it for all.

A step may be planned while the one before it still runs: a decode's token is then named by its place in that step. What
can't be planned without that step's tokens (a preemption, a penalty over the history, drafts of what comes next) waits
for them.

With a drafter a decode computes its newest token and drafts of what follows, as far as there is room in the step, and
in blocks that nobody misses. What was not drawn then counts for nothing: `advance` takes it back, with the blocks that
only it needed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator

from pdserve.engine.schedule.batch import BatchItem
from pdserve.engine.schedule.capacity import Capacity
from pdserve.engine.schedule.drafts import Drafter
from pdserve.engine.schedule.kv_cache import KvCache, Present
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.plan import Plan
from pdserve.engine.schedule.prompts import PromptShares
from pdserve.engine.schedule.sequence import Sequence, SequenceState
from pdserve.engine.schedule.shared_blocks import SharedBlocks
from pdserve.protocol import EngineLimits

REGISTERED_AT_ONCE = 256
"""Blocks of an import; 1.5 ms of the engine's thread."""


class Scheduler:
    """Queues, and the plan of each step. `limits` are the runner's."""

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
    ) -> Plan | None:
        """The next step; the sequences in it stay in the running set. The caller launches it and calls `launched`.

        Args:
            ahead: the step before is not collected yet. None is returned if planning has to wait for it.
            start_prompts: whether prompts may leave the waiting queue.
            only: those of the running set that may take part; nobody joins it then.
        """
        plan = Plan(self._limits.max_num_tokens)
        prompts = self._try_decodes(plan, only)
        while prompts is None:
            if ahead:
                return None
            self._preempt(self._victim())
            plan = Plan(self._limits.max_num_tokens)
            prompts = self._try_decodes(plan, only)
        if plan.num_decode_tokens or self.offered or self.receiving:
            plan.budget_tokens = min(plan.budget_tokens, self._max_mixed_prefill_tokens)
        if only is None:
            self._admit(plan, prompts, start_prompts)
        self._prompts.share_out(plan, prompts)
        plan.copies = self.blocks.take_copies()
        plan.accepted.extend(self.borrowing)
        self.borrowing.clear()
        self.sharing.planned(plan)
        return plan

    def lend(self, sequence: Sequence) -> bool:
        """Give `sequence`, whose KV only moves and is never read, blocks out of turn; False if that could harm others.

        The transceiver hears of an import with the next plan, as of those that were queued.
        """
        imports = sequence.state is SequenceState.AWAITING_KV
        if not self._capacity.lend(sequence, reserved=imports):
            return False
        if imports:
            self.borrowing[sequence] = None
        return True

    def launched(self, plan: Plan) -> None:
        """The step of `plan` is on its way: later plans build on it."""
        for row, (sequence, item) in enumerate(zip(plan.sequences, plan.items, strict=True)):
            sequence.num_planned += len(item.token_ids)
            sequence.num_pending += item.num_sampled
            sequence.num_in_flight += 1
            sequence.row = row
        self.sharing.launched(plan)

    def collected(self, sequence: Sequence, item: BatchItem) -> None:
        """The step of `item` is over; `advance` follows unless `sequence` has ended meanwhile."""
        sequence.num_pending -= item.num_sampled
        sequence.num_in_flight -= 1

    def advance(self, sequence: Sequence, computed: int, accepted: int) -> None:
        """A step has computed `computed` tokens of `sequence`, of which the first `accepted` are its own by now; the
        others were drafts. Full blocks of its own tokens may be reused from now on."""
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
        """Let blocks be reused, up to `full_blocks` of the sequence; a step has computed `num_computed` tokens of it.

        Of a long prompt that was imported, only some at a time: everybody's next token waits for it. The others' turn
        comes with the next steps; if it ends before, they are not reused.
        """
        first = sequence.num_registered_blocks
        at_once = max(REGISTERED_AT_ONCE, num_computed // self.blocks.tokens_per_block + 1)
        end = min(full_blocks, first + at_once)
        self.blocks.register(sequence.hashes, sequence.tables, first, end)
        sequence.num_registered_blocks = end

    def received(self, sequence: Sequence, first_token: int) -> None:
        """An import is complete: `sequence` joins the running set with `first_token`."""
        del self.receiving[sequence]
        self.blocks.commit(sequence.tables)
        num_tokens = len(sequence.token_ids)
        sequence.append(first_token)
        # The context worker has told the client.
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
        """Give the blocks of `sequence` back. What is registered stays reusable."""
        if sequence.num_registered_blocks == sequence.num_proven // self.blocks.tokens_per_block:
            self.blocks.register_tail(sequence.hashes, sequence.tables, sequence.num_proven)
        self.blocks.release(sequence.tables)
        sequence.tables = [[] for _ in sequence.tables]

    def fork(self, sequence: Sequence, child: Sequence) -> bool:
        """Let `child`, a new sequence with the tokens that `sequence` has by now, go on from its KV; False if there is
        no room for it.

        `sequence` decodes. Whichever of them writes to a block that another holds gets a copy first.
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
            # Until the next plan the block for the copy might be promised to somebody else.
            self.sharing.own_blocks()
        return True

    def checks(self, sequences: Iterable[Sequence]) -> Iterator[None]:
        """Compare the books with `sequences`, all that the engine still knows, a slice at a time; nothing may change
        meanwhile. Raises `BrokenInvariant`."""
        yield from self.blocks.checks([sequence.tables for sequence in sequences])
        self._capacity.check((*self.running, *self.receiving))

    def _try_decodes(self, plan: Plan, only: Collection[Sequence] | None) -> list[Sequence] | None:
        """Give each decoding sequence its token, and return those whose prompt is still being computed.

        None if a sequence found no block for its token, or must know the token before it.
        """
        prefilling: list[Sequence] = []
        if not self.sharing.own_blocks():
            return None
        width, drafter = self.blocks.tokens_per_block, self._drafter
        sequences, items = plan.sequences, plan.items
        candidates = self.running if only is None else [each for each in only if each in self.running]
        # Half of what the decodes leave is for prompts.
        num_drafts, spare_tokens = 0, (plan.budget_tokens - len(candidates)) // 2
        for sequence in candidates:
            planned, pending = sequence.num_planned, sequence.num_pending
            num_tokens = len(sequence.token_ids) + pending
            if num_tokens - planned != 1:
                prefilling.append(sequence)
                continue
            if num_tokens >= sequence.plan_limit_tokens:
                continue
            if len(items) + num_drafts == plan.budget_tokens:
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
        plan.num_decode_tokens = len(items)
        plan.budget_tokens -= len(items) + num_drafts
        return prefilling

    def _draft(self, sequence: Sequence, drafter: Drafter, spare_tokens: int) -> list[int]:
        """At most `spare_tokens` drafts of what follows a decode, whose own token has its block, with blocks for them.

        They are never more than the sequence may still get beside the token that is drawn in any case.
        """
        num_tokens = len(sequence.token_ids)
        most = min(self._max_drafts, spare_tokens, sequence.plan_limit_tokens - num_tokens - 1)
        drafts = drafter.propose(sequence.token_ids, most) if most > 0 else []
        # A draft is worth no block that somebody else needs: who waits, or another decode of this step.
        spare_blocks = 0 if self.waiting or self.offered else self.blocks.available - len(self.running)
        return drafts[: self._capacity.room(sequence, num_tokens + len(drafts), spare_blocks) - num_tokens]

    def _victim(self) -> Sequence:
        # One that exports has blocks for all it needs, so whoever ran out of them is itself among the candidates.
        return max((each for each in self.running if each.export_key is None), key=lambda each: each.arrival)

    def _preempt(self, sequence: Sequence) -> None:
        self.remove(sequence)
        self.release(sequence)
        sequence.reset()
        sequence.move_to(SequenceState.WAITING)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        self.num_preemptions += 1

    def _admit(self, plan: Plan, prompts: list[Sequence], start_prompts: bool) -> None:
        """Oldest first, start waiting prompts and accept offered imports until one lacks blocks or room.

        Nobody overtakes that one: else a large prompt would never find its blocks.

        Args:
            prompts: those being computed; the new ones are appended.
        """
        if self._static and (self.running or self.receiving):
            return
        budget_tokens = plan.budget_tokens - sum(self._prompts.claim(each) for each in prompts)
        early: list[Sequence] = []
        while len(self.running) + len(self.receiving) + len(early) < self._limits.max_batch_size:
            sequence = self._next_candidate(start_prompts and (budget_tokens > 0 or self._static))
            if sequence is None:
                break
            if sequence.state is SequenceState.AWAITING_KV:
                if not self._accept_import(plan, sequence):
                    break
                continue
            present = self._capacity.present(sequence)
            if not self._static and self._prompts.is_early(sequence, present, prompts):
                early.append(sequence)
                del self.waiting[sequence]
            elif self._start_prompt(plan, sequence, present, budget_tokens):
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

    def _start_prompt(self, plan: Plan, sequence: Sequence, present: Present, budget_tokens: int) -> bool:
        num_tokens = present.num_blocks * self.blocks.tokens_per_block + present.num_partial_tokens
        fits = len(sequence.token_ids) - num_tokens <= budget_tokens
        if not (fits or self._static or self._prompts.may_be_cut(sequence)):
            return False
        if not self._capacity.admit(sequence, present, alone=not self.running):
            return False
        del self.waiting[sequence]
        sequence.move_to(SequenceState.RUNNING)
        self.running[sequence] = None
        plan.admitted.append(sequence)
        return True

    def _accept_import(self, plan: Plan, sequence: Sequence) -> bool:
        """The transceiver must hear of it: until then it stays AWAITING_KV."""
        head = next(iter(self.waiting), sequence)
        kept_blocks = self._capacity.wanted_blocks(head) if head.arrival < sequence.arrival else 0
        present = self._capacity.present(sequence, imports=True)
        alone = not self.running
        if not self._capacity.admit(sequence, present, reserved=True, kept_blocks=kept_blocks, alone=alone):
            return False
        del self.offered[sequence]
        self.receiving[sequence] = None
        plan.accepted.append(sequence)
        return True

"""Rules for prompts: how they share a step, which of them wait for a later step, and when the first one may start.

The scheduler asks `PromptShares` while it plans a step. The engine asks `BatchWait` before.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as List

from pdserve.engine.schedule.kv_cache import Present
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.planned_step import PlannedStep
from pdserve.engine.schedule.sequence import Sequence
from pdserve.engine.schedule.shared_blocks import SharedBlocks
from pdserve.protocol import EngineLimits

WORTH_A_STEP_TOKENS = 128
"""A prompt waits one step if another prompt computes at least so many of its tokens in the step being planned."""


class PromptShares:
    """The rules of an engine with these limits and options."""

    def __init__(self, sharing: SharedBlocks, limits: EngineLimits, options: EngineOptions) -> None:
        self._sharing = sharing
        self._reuse = options.enable_block_reuse
        self._tokens_per_block = limits.tokens_per_block
        self._max_num_tokens = limits.max_num_tokens
        self._large_tokens = max(1, limits.max_num_tokens // 2)
        self._chunked = options.enable_chunked_prefill
        self._equally = options.chunking_policy == "EQUAL_PROGRESS"

    def is_early(self, sequence: Sequence, present: Present, prompts: list[Sequence]) -> bool:
        """Whether `sequence` should start one step later, because this step computes its next tokens for another one.

        Args:
            present: what is cached of `sequence`.
            prompts: the sequences that compute prompts in this step.
        """
        if not prompts or not self._reuse or sequence.prompt_logprobs is not None:
            return False
        width = self._tokens_per_block
        num_worth = -(-WORTH_A_STEP_TOKENS // width)
        end = present.num_blocks + num_worth
        if len(sequence.token_ids) <= end * width:
            return False
        digest = sequence.hashes.digest(end - 1)
        for other in prompts:
            same_place = other.num_planned // width == present.num_blocks and len(other.token_ids) >= end * width
            if same_place and other.hashes.digest(end - 1) == digest:
                return True
        return False

    def share_out(self, step: PlannedStep, prompts: list[Sequence]) -> None:
        """Add chunks of `prompts`, oldest first, to `step`, within its `budget_tokens`."""
        prompts = self._sharing.writers(step, prompts)
        wanted = [len(each.token_ids) - each.num_planned for each in prompts]
        if self._equally:
            shares = equal_shares(wanted, step.budget_tokens, self._tokens_per_block)
        else:
            may_be_cut = [self.may_be_cut(each) for each in prompts]
            # In a step with little room for prompts, everybody is cut anyway.
            large_tokens = self._large_tokens if step.budget_tokens > self._large_tokens else None
            shares = shares_in_order(wanted, step.budget_tokens, may_be_cut, large_tokens)
        for sequence, num_tokens in zip(prompts, shares, strict=True):
            if num_tokens:
                step.add_chunk(sequence, num_tokens)

    def claim(self, sequence: Sequence) -> int:
        """Tokens of the step's budget that `sequence` takes before any prompt behind it gets some."""
        wanted = len(sequence.token_ids) - sequence.num_planned
        return min(wanted, self._tokens_per_block) if self._equally else wanted

    def may_be_cut(self, sequence: Sequence) -> bool:
        """Whether a prompt may be computed in several steps.

        Without chunked prefill, only one that is longer than a step may be: a preempted sequence whose output is
        computed again with its prompt.
        """
        return self._chunked or len(sequence.token_ids) > self._max_num_tokens


def shares_in_order(
    wanted: List[int], budget_tokens: int, may_be_cut: List[bool], large_tokens: int | None
) -> list[int]:
    """Tokens for each prompt: the first gets all that it wants, then the next. One that may not be cut gets all or
    none.

    A prompt that wants `large_tokens` or more gets nothing behind another one, nor do those behind it: it fills a step
    by itself, and the others are done sooner without it.
    """
    shares = [0] * len(wanted)
    for index, (tokens, cuttable) in enumerate(zip(wanted, may_be_cut, strict=True)):
        if large_tokens is not None and tokens >= large_tokens and any(shares):
            break
        shares[index] = min(tokens, budget_tokens) if cuttable or tokens <= budget_tokens else 0
        budget_tokens -= shares[index]
    return shares


def equal_shares(wanted: List[int], budget_tokens: int, unit_tokens: int) -> list[int]:
    """Tokens for each prompt: the same number for all, in whole units. What a prompt does not want goes to the others.

    The last unit may be smaller, so that a small budget makes progress, too.
    """
    shares = [0] * len(wanted)
    hungry = [index for index, tokens in enumerate(wanted) if tokens]
    while hungry and budget_tokens:
        portion = max(budget_tokens // len(hungry) // unit_tokens, 1) * unit_tokens
        for index in hungry:
            share = min(portion, wanted[index] - shares[index], budget_tokens)
            shares[index] += share
            budget_tokens -= share
        hungry = [index for index in hungry if shares[index] < wanted[index]]
    return shares


class BatchWait:
    """Holds prompts back while nothing runs, so that several can start together.

    They start `wait_s` after the oldest was received, or when there are `max_batch_size` of them. `until_s` is when
    those held back start, by the engine's clock; None while none are.
    """

    def __init__(self, wait_s: float, max_batch_size: int) -> None:
        self.until_s: float | None = None
        self._wait_s = wait_s
        self._max_batch_size = max_batch_size

    def holds(self, waiting: Collection[Sequence], running: Collection[Sequence], now_s: float) -> bool:
        """Whether `waiting`, oldest first, should wait for further prompts. They never wait while something runs."""
        self.until_s = None
        if not self._wait_s or not waiting or running or len(waiting) >= self._max_batch_size:
            return False
        until_s = next(iter(waiting)).milestones.received_s + self._wait_s
        if now_s >= until_s:
            return False
        self.until_s = until_s
        return True

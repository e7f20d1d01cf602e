"""A request as the engine sees it: its tokens, its blocks, and where in its life it is.

Owns the state machine below and the rules by which output ends; decides nothing about when a state changes.

    phase "both", or "context":     WAITING ──► RUNNING ──► FINISHED
                                       ▲───────────┘ preempted: blocks freed, tokens kept
    "context" with a peer:          WAITING ──► RUNNING ──► EXPORTING ──► FINISHED
    "generation":                   AWAITING_KV ──► RECEIVING ──► RUNNING ──► FINISHED

ABORTING: the client has its `Finished`, but the blocks are still in use, so they are not free yet. The transceiver uses
them (RUNNING with an open export, EXPORTING, RECEIVING), or a step that was launched and not collected does.

An AWAITING_KV sequence has blocks for a moment: from the step that accepts the import until the copies before that
step are made. Then the transceiver is told of them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from pdserve.engine.schedule.prefix_cache import BlockHashes
from pdserve.errors import PdserveError
from pdserve.handoff import FREE, HandoffCost
from pdserve.protocol import (
    EngineLimits,
    Finished,
    FinishReason,
    GenerateRequest,
    Timings,
    TokenDelta,
    TokenLogprob,
    Usage,
)


class SequenceState(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    EXPORTING = "exporting"
    AWAITING_KV = "awaiting_kv"
    RECEIVING = "receiving"
    ABORTING = "aborting"
    FINISHED = "finished"


_S = SequenceState
_NEXT: dict[SequenceState, frozenset[SequenceState]] = {
    _S.WAITING: frozenset({_S.RUNNING, _S.FINISHED}),
    _S.RUNNING: frozenset({_S.WAITING, _S.EXPORTING, _S.ABORTING, _S.FINISHED}),
    _S.EXPORTING: frozenset({_S.ABORTING, _S.FINISHED}),
    _S.AWAITING_KV: frozenset({_S.RECEIVING, _S.ABORTING, _S.FINISHED}),
    _S.RECEIVING: frozenset({_S.RUNNING, _S.ABORTING, _S.FINISHED}),
    _S.ABORTING: frozenset({_S.FINISHED}),
    _S.FINISHED: frozenset(),
}


@dataclass(slots=True)
class Milestones:
    """When a sequence reached each phase, in seconds of the engine's clock; None: not yet.

    `handoff_from_s` is the first token on a context worker, and the offer on a generation worker. `decode_from_s` is
    the first token with phase "both", else the end of the handoff. `handoff_cost` is by the transceiver's clock.
    """

    received_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    handoff_from_s: float | None = None
    handed_off_s: float | None = None
    decode_from_s: float | None = None
    handoff_cost: HandoffCost = FREE

    def timings(self, now_s: float) -> Timings:
        """Time by phase until `now_s`; a phase that was never reached took none."""
        taken_up_s = _known(self.scheduled_s, _known(self.handoff_from_s, now_s))
        return Timings(
            queue_s=_span(self.received_s, taken_up_s),
            prefill_s=_span(self.scheduled_s, _known(self.first_token_s, now_s)),
            handoff_s=_span(self.handoff_from_s, self.handed_off_s),
            decode_s=_span(self.decode_from_s, now_s),
            transfer_s=self.handoff_cost.busy_s,
            exposed_s=self.handoff_cost.exposed_s,
            moving_s=self.handoff_cost.moving_s,
        )


def _known(instant_s: float | None, otherwise_s: float) -> float:
    return otherwise_s if instant_s is None else instant_s


def _span(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else max(0.0, end_s - start_s)


class Sequence:
    """The engine's private record of one attempt.

    Attributes:
        token_ids: prompt and output as far as the host knows them. `prompt_ids` and `output_ids` are the two parts.
        tables: one block table a cache group.
        num_computed: tokens, from the first, whose KV the collected steps have put into the blocks.
        num_proven: those of them whose KV stays right whatever fails: it depends neither on a copy that is still to be
            made nor on a step in flight that computes a shared block.
        num_planned: as `num_computed`, with the steps in flight.
        num_pending: tokens that steps in flight sample; at most one when the next step is planned.
        num_in_flight: steps with this sequence that were launched and not collected.
        row: its place in the newest of these steps.
        num_registered_blocks: blocks, from the first, that are offered for reuse.
        num_cached_tokens: prompt tokens that were not computed because the cache held them.
        prefix_is_copied: whether a copy before the first step brings part of the prefix.
        num_told: tokens of the output that the client has been told; `untold_logprobs` belong to the others.
        export_key: set if the KV goes to a peer; such a sequence is never preempted, for the transceiver knows its
            blocks.
        handoff_open: whether the transceiver knows the key, or will, and must be told if the request ends early.
        plan_limit_tokens: no step draws a token beyond so many; a context request gets one token.
        max_total_tokens: prompt and output together end here.
    """

    __slots__ = (
        "arrival",
        "deadline_s",
        "export_key",
        "handoff_open",
        "hashes",
        "key",
        "max_total_tokens",
        "milestones",
        "num_cached_tokens",
        "num_computed",
        "num_in_flight",
        "num_pending",
        "num_planned",
        "num_proven",
        "num_registered_blocks",
        "num_told",
        "output_ids",
        "plan_limit_tokens",
        "prefix_is_copied",
        "prompt_ids",
        "prompt_logprobs",
        "request",
        "row",
        "sampling",
        "state",
        "stop_ids",
        "tables",
        "token_ids",
        "untold_logprobs",
    )

    def __init__(self, request: GenerateRequest, limits: EngineLimits, arrival: int, now_s: float) -> None:
        sampling, num_prompt = request.sampling, request.num_prompt_tokens
        self.request = request
        self.key = request.key
        self.export_key = request.key if request.phase == "context" and request.peer is not None else None
        self.sampling = sampling
        self.arrival = arrival
        self.deadline_s = now_s + request.timeout_s
        self.milestones = Milestones(now_s)
        self.state = _S.AWAITING_KV if request.phase == "generation" else _S.WAITING
        self.token_ids = list(request.token_ids)
        self.prompt_ids = self.token_ids[:num_prompt]
        self.output_ids = self.token_ids[num_prompt:]
        self.max_total_tokens = _max_total_tokens(request, limits)
        self.plan_limit_tokens = len(self.token_ids) + 1 if request.phase == "context" else self.max_total_tokens
        self.stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(limits.eos_token_ids)
        )
        self.tables: list[list[int]] = [[] for _ in limits.cache_groups]
        self.hashes = BlockHashes(self.token_ids, limits.tokens_per_block, (request.cache_salt,))
        self.num_registered_blocks = 0
        self.num_computed = self.num_planned = self.num_proven = 0
        self.prefix_is_copied = False
        self.num_pending = self.num_in_flight = self.row = 0
        self.num_cached_tokens = 0
        self.num_told = len(self.output_ids)
        self.untold_logprobs: list[TokenLogprob] = []
        self.handoff_open = request.phase == "generation"
        wants_prompt_logprobs = sampling.prompt_logprobs is not None and request.phase != "generation"
        self.prompt_logprobs: list[TokenLogprob | None] | None = (
            [None] if wants_prompt_logprobs and not self.output_ids else None
        )

    def __repr__(self) -> str:
        return f"Sequence({self.key}, {self.state.value}, {self.num_computed}/{len(self.token_ids)} tokens)"

    @property
    def needs_history(self) -> bool:
        """Whether sampling reads the values of the tokens before (penalties), so that they must be known first."""
        sampling = self.sampling
        penalty = sampling.presence_penalty or sampling.frequency_penalty
        return sampling.repetition_penalty != 1.0 or bool(penalty)

    def move_to(self, state: SequenceState) -> None:
        """Change the state along an edge of the diagram above."""
        assert state in _NEXT[self.state], f"{self} can't become {state.value}"
        self.state = state

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)

    def note_first_token(self, now_s: float) -> None:
        """The client is being told the first token that this engine has made."""
        self.prompt_logprobs = None
        milestones = self.milestones
        milestones.first_token_s = now_s
        if self.handoff_open:
            milestones.handoff_from_s = now_s
        elif milestones.decode_from_s is None:
            milestones.decode_from_s = now_s

    def end_reason(self) -> FinishReason | None:
        """Why the newest output token ends the request, if it does."""
        output = self.output_ids
        if output and output[-1] in self.stop_ids and len(output) >= self.sampling.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_total_tokens else None

    def reset(self) -> None:
        """The blocks are gone: forget all KV. The tokens stay, and are computed again."""
        self.tables = [[] for _ in self.tables]
        self.num_registered_blocks = 0
        self.num_computed = self.num_planned = self.num_proven = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def set_back(self, tokens_per_block: int) -> None:
        """Count only the proven KV. The rest is computed again in the same blocks."""
        self.num_computed = self.num_planned = self.num_proven
        self.num_registered_blocks = min(self.num_registered_blocks, self.num_proven // tokens_per_block)
        self.num_cached_tokens = min(self.num_cached_tokens, self.num_proven)

    def tell(self) -> TokenDelta:
        """The tokens that the client has not been told yet. They count as told from now on."""
        start, logprobs = self.num_told, self.untold_logprobs
        token_ids = self.output_ids[start:]
        self.num_told += len(token_ids)
        if logprobs:
            self.untold_logprobs = []
        return TokenDelta(self.key, start, token_ids, logprobs or None, self.prompt_logprobs)

    def finished(self, reason: FinishReason, now_s: float, error: PdserveError | None) -> Finished:
        """The last message to the client about this attempt."""
        usage = Usage(len(self.prompt_ids), len(self.output_ids), self.num_cached_tokens)
        timings, kv_bytes = self.milestones.timings(now_s), self.milestones.handoff_cost.nbytes
        return Finished(self.key, reason, usage, timings, None if error is None else error.to_info(), kv_bytes)


def _max_total_tokens(request: GenerateRequest, limits: EngineLimits) -> int:
    wanted = min(request.num_prompt_tokens + request.sampling.max_tokens, limits.max_seq_len)
    if request.phase == "context":
        return wanted
    # The last token's KV is never needed, so a pool of n tokens carries a sequence to n + 1.
    return min(wanted, min(group.num_blocks for group in limits.cache_groups) * limits.tokens_per_block + 1)

"""One step as the scheduler has planned it, and how the step's tokens are shared out among prompts."""

from __future__ import annotations

from collections.abc import Sequence as List

from pdserve.engine.schedule.batch import BatchItem, BlockCopy
from pdserve.engine.schedule.sequence import Sequence, SequenceState


class Plan:
    """One step: `items[i]` is the share of `sequences[i]`; `copies` come before it.

    `admitted` were taken from the waiting queue, `accepted` from the offered imports: the engine must tell the mover.
    """

    __slots__ = (
        "accepted",
        "admitted",
        "budget_tokens",
        "copies",
        "items",
        "num_decode_tokens",
        "num_prefill_tokens",
        "sequences",
    )

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.sequences: list[Sequence] = []
        self.items: list[BatchItem] = []
        self.copies: list[BlockCopy] = []
        self.admitted: list[Sequence] = []
        self.accepted: list[Sequence] = []
        self.num_decode_tokens = self.num_prefill_tokens = 0

    def __repr__(self) -> str:
        return f"a step of {', '.join(str(each.key) for each in self.sequences)} after {len(self.copies)} copies"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch."""
        return not self.items and not self.copies

    def casualties(self) -> list[Sequence]:
        """The sequences that must be set back if the step fails: those in it, and those that rely on its copies.

        An import does if the mover has not heard of it yet.
        """
        uncopied = self.admitted if self.copies else []
        untold = [each for each in self.accepted if each.state is SequenceState.AWAITING_KV]
        return list(dict.fromkeys([*self.sequences, *uncopied, *untold]))

    def add_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the next `num_tokens` tokens of a prompt, or of a history that is computed again."""
        start = sequence.num_planned
        end = start + num_tokens
        self.sequences.append(sequence)
        self.items.append(
            BatchItem(
                token_ids=sequence.token_ids[start:end],
                start=start,
                tables=sequence.tables,
                num_sampled=int(end == len(sequence.token_ids)),
                sampling=sequence.sampling,
                prompt_ids=sequence.prompt_ids,
                output_ids=sequence.output_ids,
                next_prompt_token=sequence.prompt_ids[end] if end < len(sequence.prompt_ids) else None,
                want_prompt_logprobs=sequence.prompt_logprobs is not None,
                export_key=sequence.export_key,
            )
        )
        self.budget_tokens -= num_tokens
        self.num_prefill_tokens += num_tokens


def shares_in_order(
    wanted: List[int], budget_tokens: int, may_be_cut: List[bool], large_tokens: int | None
) -> list[int]:
    """Tokens for each of `wanted`: the first gets all it wants, then the next. Who may not be cut gets all or none.

    Nothing goes to one that wants `large_tokens` or more, nor to those behind it, if somebody is before it: it would
    fill a step of its own as well, and those before it be done the sooner.
    """
    shares = [0] * len(wanted)
    for index, (tokens, cuttable) in enumerate(zip(wanted, may_be_cut, strict=True)):
        if large_tokens is not None and tokens >= large_tokens and any(shares):
            break
        shares[index] = min(tokens, budget_tokens) if cuttable or tokens <= budget_tokens else 0
        budget_tokens -= shares[index]
    return shares


def equal_shares(wanted: List[int], budget_tokens: int, unit_tokens: int) -> list[int]:
    """Tokens for each of `wanted`, equally many and in whole units, except that who wants less leaves it to the others.

    The last unit may be a smaller one, so that there is progress however little budget there is.
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

"""One step as the scheduler has planned it, until it is collected."""

from __future__ import annotations

from collections.abc import Iterator

from pdserve.engine.schedule.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.engine.schedule.sequence import Sequence, SequenceState


class Plan:
    """One step: `items[i]` is the share of `sequences[i]`; `copies` come before it.

    `admitted` were taken from the waiting queue, `accepted` from the offered imports: the engine must tell the
    transceiver. `relying` count KV as theirs that the copies, or a step in flight, may fail to bring, like `admitted`.
    In flight, it is the step that was `launched`, and `is_doomed` if one before it has failed; of the `imports` the
    transceiver hears when it is over.
    """

    __slots__ = (
        "accepted",
        "admitted",
        "budget_tokens",
        "copies",
        "imports",
        "is_doomed",
        "items",
        "launched",
        "num_decode_tokens",
        "num_prefill_tokens",
        "relying",
        "sequences",
    )

    def __init__(self, budget_tokens: int) -> None:
        self.budget_tokens = budget_tokens
        self.sequences: list[Sequence] = []
        self.items: list[BatchItem] = []
        self.copies: list[BlockCopy] = []
        self.admitted: list[Sequence] = []
        self.accepted: list[Sequence] = []
        self.relying: list[Sequence] = []
        self.launched: LaunchedStep | None = None
        self.imports: list[Sequence] = []
        self.is_doomed = False
        self.num_decode_tokens = self.num_prefill_tokens = 0

    def __repr__(self) -> str:
        return f"a step of {', '.join(str(each.key) for each in self.sequences)} after {len(self.copies)} copies"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch."""
        return not self.items and not self.copies

    def casualties(self) -> list[Sequence]:
        """The sequences that must be set back if the step fails: those in it, and those that rely on its copies or on
        the step before it.

        An import does if the transceiver has not heard of it yet.
        """
        untold = [each for each in self.accepted if each.state is SequenceState.AWAITING_KV]
        return list(dict.fromkeys([*self.sequences, *self.admitted, *self.relying, *untold]))

    def chunks(self) -> Iterator[tuple[Sequence, BatchItem]]:
        """The shares of prompts, which follow those of decodes."""
        first = self.num_decode_tokens
        return zip(self.sequences[first:], self.items[first:], strict=True)

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

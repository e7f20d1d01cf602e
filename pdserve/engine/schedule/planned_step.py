"""One step as the scheduler plans it: which sequences take part, with which tokens, and what is copied before it.

`Scheduler.plan` makes it, `StepPipeline` launches and collects it. It holds sequences, which the runner never sees: the
runner gets `items` and `copies`.
"""

from __future__ import annotations

from collections.abc import Iterator

from pdserve.engine.schedule.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.engine.schedule.sequence import Sequence, SequenceState


class PlannedStep:
    """See the module.

    Attributes:
        sequences, items: `items[i]` is the share of `sequences[i]`. Decodes come first.
        copies: block copies that the runner makes before the step.
        admitted: sequences that leave the waiting queue with this step. The engine offers those with a peer to the
            transceiver.
        accepted: offered imports that got blocks. The engine names the blocks to the transceiver.
        relying: sequences that count KV as theirs which this step's copies, or a step in flight, are still to bring.
            They must be set back if that fails, as `admitted` must.
        budget_tokens: tokens that may still be added to the step.
        launched: the step at the runner; None before the launch.
        is_doomed: a step that was launched before this one has failed, so this one's results mean nothing.
        imports: imports of which the transceiver hears when this step is collected, because its copies come first.
        num_decode_tokens, num_prefill_tokens: decodes, drafts not counted, and tokens of chunks.
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
        """The sequences that must be set back if the step fails.

        They are those in the step, those that rely on its copies or on the step before it, and the accepted imports of
        which the transceiver has not heard yet.
        """
        untold = [each for each in self.accepted if each.state is SequenceState.AWAITING_KV]
        return list(dict.fromkeys([*self.sequences, *self.admitted, *self.relying, *untold]))

    def chunks(self) -> Iterator[tuple[Sequence, BatchItem]]:
        """The sequences that compute part of a prompt in this step, each with its item."""
        first = self.num_decode_tokens
        return zip(self.sequences[first:], self.items[first:], strict=True)

    def add_chunk(self, sequence: Sequence, num_tokens: int) -> None:
        """Add the next `num_tokens` tokens of a prompt, or of a history that is computed again, to the step."""
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

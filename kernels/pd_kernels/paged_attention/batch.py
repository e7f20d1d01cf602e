"""Which tokens of a step belong to which sequence, and where that sequence's cache is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PrefillRoom:
    """Room for the prefills of a step that is captured as a graph: they stand on the device, and may differ from replay
    to replay.

    Args:
        spans: [num_seqs, 3] integer tensor: a sequence's first row in the step, its new tokens, and how many it had
            before. What has no new tokens is empty.
        block_tables: [num_seqs, width] integer tensor, as a batch's.
        max_tokens: rows of the step, after its decodes, that are theirs. Rows past the last sequence are padding, whose
            output is undefined.
        max_context: tokens of all of them after the step, of each its `gathered_tokens`.
    """

    spans: Tensor
    block_tables: Tensor
    max_tokens: int
    max_context: int


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of a step; their new tokens are packed one sequence after another.

    Sequences with one new token ("decodes") come first. Neighbours of similar length are attended together where
    that pays, so decodes are best sorted by length.

    Args:
        q_lens: new tokens of each sequence, at least one.
        seq_lens: tokens of each sequence after this step, the new ones included. 0 is a padding row of a CUDA graph,
            among the decodes: its output is zeros, and none of its cache is read.
        q_starts: [num_seqs + 1] integer tensor: where each sequence's new tokens start, then their total.
        seq_lens_tensor: `seq_lens` as a tensor. The Triton plan takes the decodes' lengths from here alone, so that
            a graph captured with it may be replayed over other lengths.
        block_tables: [num_seqs, width] integer tensor: block of token t is entry t // tokens_per_block. Entries past
            a sequence's end name any block of the pool. Those of blocks that are wholly before the window of its first
            new token are never looked at.
        prefill_room: prefills of a captured step, behind its decodes; all other sequences are decodes then. Triton
        only.
    """

    q_lens: Sequence[int]
    seq_lens: Sequence[int]
    q_starts: Tensor
    seq_lens_tensor: Tensor
    block_tables: Tensor
    prefill_room: PrefillRoom | None = None

    @cached_property
    def num_decodes(self) -> int:
        """How many sequences at the front have one new token."""
        return next((index for index, q_len in enumerate(self.q_lens) if q_len != 1), len(self.q_lens))

"""A step as plain data: what the device must know of a batch, packed on the host, the same for every rank.

Owns the packing and nothing of a request, except which block tables the device was sent. All numbers of a step stand
in one array, so that they reach the device in one copy, and another process in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Key

Array = np.ndarray[Any, Any]

TOKEN, POSITION, SLOT, LENGTH, PREVIOUS = range(5)
PADDING = np.array([0, 0, -1, 0, -1], np.int64)

# Rows whose logits exist at one time while a prompt is scored: a whole prompt's could outgrow the model.
_SCORED_ROWS = 256


@dataclass(frozen=True, slots=True)
class EagerStep:
    """A step of any kind. Its sequences are reordered, decodes first and longest first, as attention wants them.

    `sizes` are the lengths of the parts of `values`, int64: token_ids, positions, slots (one each a token); q_starts
    [num_seqs + 1]; seq_lens; block tables [num_seqs, width]; rows of the tokens that only the device knows, and the
    items of the step before that sampled them; rows whose logits are sampled, the items they belong to, and their
    sequences' places in the step (the last two also as lists). `scored` are the rows, [start, stop), whose logits score
    prompt tokens, in pieces that fit into memory. `exports` are the sequences whose KV goes to a peer: key, and the
    tokens that are computed before and after the step.
    """

    q_lens: list[int]
    seq_lens: list[int]
    sizes: list[int]
    values: Array
    scored: list[tuple[int, int]]
    order: list[int]
    sampled_items: list[int]
    sampled_seqs: list[int]
    exports: list[tuple[Key, int, int]]


@dataclass(frozen=True, slots=True)
class GraphStep:
    """A step of decodes for the CUDA graph of `size` rows; item i is row i, the rest is padding.

    `values`, int64: [5, size] of token, position, slot, length and item of the step before that sampled the token (-1:
    the token is given); then places in the flattened block tables, and what stands there from now on.
    """

    size: int
    num_items: int
    values: Array

    @property
    def sampled_items(self) -> list[int]:
        return list(range(self.num_items))


class ChunkLimits(NamedTuple):
    """What a captured step has room for, behind its decodes: rows of prompts' chunks, sequences that they are of, and
    tokens that these have by then, of each its `gathered_tokens`."""

    num_tokens: int
    num_seqs: int
    max_context: int


@dataclass(frozen=True, slots=True)
class MixedStep:
    """A step of decodes and prompts' chunks, for the CUDA graph of `size` decodes and all the room for chunks.

    `values`, int64: rows as a `GraphStep`'s, [5, size] of decodes and [5, limits.num_tokens] of chunks; of each
    sequence that has a chunk its first row, new tokens and those before, and its block table; the rows that sample,
    [size + limits.num_seqs], of which the first are meant, and their items likewise; updates of the decodes' block
    tables.
    """

    size: int
    sampled_items: list[int]
    values: Array


HostStep = EagerStep | GraphStep | MixedStep


def pack_eager(items: Sequence[BatchItem], tokens_per_block: int) -> EagerStep:
    """Pack `items`, each with at least one token; without padding."""
    order = sorted(range(len(items)), key=lambda index: (len(items[index].token_ids) > 1, -items[index].start))
    ordered = [items[index] for index in order]
    q_lens = [len(item.token_ids) for item in ordered]
    seq_lens = [item.start + q_len for item, q_len in zip(ordered, q_lens, strict=True)]
    q_starts = [0, *accumulate(q_lens)]
    tables = _block_tables(ordered, seq_lens, tokens_per_block)
    owners = np.repeat(np.arange(len(ordered)), q_lens)
    positions = (
        np.arange(len(owners)) + np.array([i.start - s for i, s in zip(ordered, q_starts, strict=False)])[owners]
    )
    slots = tables[owners, positions // tokens_per_block] * tokens_per_block + positions % tokens_per_block
    unknown = [(q_starts[row], item.previous) for row, item in enumerate(ordered) if item.previous is not None]
    sampled = [(q_starts[row + 1] - 1, order[row], row) for row, item in enumerate(ordered) if item.num_sampled]
    parts = [
        np.fromiter((token for item in ordered for token in item.token_ids), np.int64, len(owners)),
        positions,
        slots,
        np.array(q_starts, np.int64),
        np.array(seq_lens, np.int64),
        tables.ravel(),
        *np.array(unknown, np.int64).reshape(-1, 2).T,
        *np.array(sampled, np.int64).reshape(-1, 3).T,
    ]
    scored = [piece for row, item in enumerate(ordered) for piece in _scored_rows(item, q_starts[row])]
    exports = [(i.export_key, i.start, end) for i, end in zip(ordered, seq_lens, strict=True) if i.export_key]
    return EagerStep(
        q_lens=q_lens,
        seq_lens=seq_lens,
        sizes=[len(part) for part in parts],
        values=np.concatenate(parts),
        scored=scored,
        order=order,
        sampled_items=[item for _, item, _ in sampled],
        sampled_seqs=[seq for _, _, seq in sampled],
        exports=exports,
    )


def without_cache_writes(step: EagerStep) -> EagerStep:
    """`step` with a slot of -1 for each token: its KV is written nowhere."""
    first = sum(step.sizes[:2])
    step.values[first : first + step.sizes[2]] = -1
    return step


def prompt_targets(item: BatchItem) -> list[int]:
    """The prompt tokens that follow each of the item's tokens: those that its prompt log-probabilities score."""
    last = [] if item.next_prompt_token is None else [item.next_prompt_token]
    return [*item.token_ids[1:], *last]


def _scored_rows(item: BatchItem, first_row: int) -> list[tuple[int, int]]:
    if not item.want_prompt_logprobs:
        return []
    stop = first_row + len(prompt_targets(item))
    return [(row, min(row + _SCORED_ROWS, stop)) for row in range(first_row, stop, _SCORED_ROWS)]


def _block_tables(items: Sequence[BatchItem], seq_lens: Sequence[int], tokens_per_block: int) -> Array:
    """[num_items, most blocks of any item]; entries past an item's end are 0."""
    counts = [-(-seq_len // tokens_per_block) for seq_len in seq_lens]
    tables = np.zeros((len(items), max(counts)), np.int64)
    for row, (item, count) in enumerate(zip(items, counts, strict=True)):
        tables[row, :count] = item.tables[0][:count]
    return tables

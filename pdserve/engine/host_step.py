"""A step as plain data: what the device must know of a batch, packed on the host, the same for every rank.

Owns the packing and nothing of a request, except which block tables the device was sent. All numbers of a step stand
in one array, so that they reach the device in one copy, and another process in one message.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from pdserve.engine.batch import BatchItem
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


HostStep = EagerStep | GraphStep


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
    sampled = [(q_starts[row + 1] - 1, order[row], row) for row, item in enumerate(ordered) if item.sample]
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
        tables[row, :count] = item.block_ids[:count]
    return tables


class GraphPacker:
    """Packs decodes for CUDA graphs, and knows which block tables the device holds already.

    Args:
        sizes: the captured batch sizes, ascending.
        max_blocks: width of the device's block tables.
        pad: whether a step may run in a larger graph.
    """

    def __init__(self, sizes: Sequence[int], tokens_per_block: int, max_blocks: int, pad: bool) -> None:
        self._sizes, self._width, self._max_blocks, self._pad = sizes, tokens_per_block, max_blocks, pad
        # By row: the sequence's own (growing) list, and how much of it was sent.
        self._sent: list[tuple[Sequence[int], int]] = []
        self.forget()

    def forget(self) -> None:
        """A packed step may not have reached the device: send all tables again."""
        self._sent = [((), 0)] * self._sizes[-1]

    def pack(self, items: Sequence[BatchItem]) -> GraphStep | None:
        """None if no graph can run `items`."""
        size = self._size_for(items)
        if size is None:
            return None
        width = self._width
        rows = np.repeat(PADDING[:, None], size, axis=1)
        rows[:, : len(items)] = np.array(
            [
                (
                    item.token_ids[0],
                    item.start,
                    item.block_ids[item.start // width] * width + item.start % width,
                    item.start + 1,
                    -1 if item.previous is None else item.previous,
                )
                for item in items
            ],
            np.int64,
        ).T
        at, values = self._table_updates(items)
        return GraphStep(size, len(items), np.concatenate([rows.ravel(), np.array(at + values, np.int64)]))

    def _size_for(self, items: Sequence[BatchItem]) -> int | None:
        at = bisect.bisect_left(self._sizes, len(items))
        if at == len(self._sizes) or (not self._pad and self._sizes[at] != len(items)):
            return None
        decodes = all(
            len(item.token_ids) == 1 and item.sample and not item.want_prompt_logprobs and item.export_key is None
            for item in items
        )
        return self._sizes[at] if decodes else None

    def _table_updates(self, items: Sequence[BatchItem]) -> tuple[list[int], list[int]]:
        at: list[int] = []
        values: list[int] = []
        for row, item in enumerate(items):
            block_ids = item.block_ids
            owner, sent = self._sent[row]
            if owner is not block_ids or sent != len(block_ids):
                first = sent if owner is block_ids and sent < len(block_ids) else 0
                at.extend(range(row * self._max_blocks + first, row * self._max_blocks + len(block_ids)))
                values.extend(block_ids[first:])
                self._sent[row] = (block_ids, len(block_ids))
        return at, values

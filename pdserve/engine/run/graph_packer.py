"""Packs steps for CUDA graphs: decodes, alone or with prompts' chunks. Knows which block tables the device holds.

A graph has fixed sizes, so a step takes the smallest that holds it, and what is left is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from pd_kernels.paged_attention import gathered_tokens
from pdserve.engine.run.host_step import PADDING, Array, ChunkLimits, GraphStep, MixedStep
from pdserve.engine.schedule.batch import BatchItem

# A graph of decodes and chunks for every so many of decodes alone: padding costs little beside a chunk.
_SIZES_A_MIXED_ONE = 4


def mixed_sizes(sizes: Sequence[int]) -> list[int]:
    """Those of `sizes`, ascending, that are captured with room for chunks, too; the largest among them."""
    return list(sizes[::-1][::_SIZES_A_MIXED_ONE][::-1])


class GraphPacker:
    """Packs for the graphs of `sizes` decodes, ascending, and `mixed_sizes` of them with chunks.

    Args:
        max_blocks: width of the device's block tables.
        pad: whether a step of decodes may run in a larger graph.
        limits: what there is room for beside decodes; None: nothing.
    """

    def __init__(
        self, sizes: Sequence[int], tokens_per_block: int, max_blocks: int, pad: bool, limits: ChunkLimits | None = None
    ) -> None:
        self._sizes, self._width, self._max_blocks, self._pad = sizes, tokens_per_block, max_blocks, pad
        self._mixed_sizes, self._limits = mixed_sizes(sizes), limits
        # By row: the sequence's own (growing) list, and how much of it was sent.
        self._sent: list[tuple[Sequence[int], int]] = []
        self.forget()

    def forget(self) -> None:
        """A packed step may not have reached the device: send all tables again."""
        self._sent = [((), 0)] * self._sizes[-1]

    def pack(self, items: Sequence[BatchItem]) -> GraphStep | MixedStep | None:
        """None if no graph can run `items`."""
        num_decodes = next((at for at, item in enumerate(items) if not _is_decode(item)), len(items))
        if num_decodes < len(items):
            return self._pack_mixed(items[:num_decodes], items[num_decodes:])
        size = _smallest(self._sizes, len(items))
        if size is None or not (self._pad or size == len(items)):
            return None
        return GraphStep(size, len(items), np.concatenate([self._rows(items, size).ravel(), *self._updates(items)]))

    def _pack_mixed(self, decodes: Sequence[BatchItem], chunks: Sequence[BatchItem]) -> MixedStep | None:
        limits, size = self._limits, _smallest(self._mixed_sizes, len(decodes))
        if limits is None or size is None or not _fit(chunks, limits):
            return None
        rows, spans = np.repeat(PADDING[:, None], limits.num_tokens, axis=1), np.zeros((limits.num_seqs, 3), np.int64)
        tables = np.zeros((limits.num_seqs, self._max_blocks), np.int64)
        sampled, items = list(range(len(decodes))), list(range(len(decodes)))
        first = 0
        for seq, item in enumerate(chunks):
            end, num_tokens = first + len(item.token_ids), len(item.token_ids)
            block_ids = item.tables[0]
            tables[seq, : len(block_ids)] = block_ids
            positions = np.arange(item.start, item.start + num_tokens)
            slots = tables[seq, positions // self._width] * self._width + positions % self._width
            rows[:3, first:end] = np.array(item.token_ids, np.int64), positions, slots
            spans[seq] = size + first, num_tokens, item.start
            if item.num_sampled:
                sampled.append(size + end - 1)
                items.append(len(decodes) + seq)
            first = end
        padding = [0] * (size + limits.num_seqs - len(items))
        told = [np.array([*part, *padding], np.int64) for part in (sampled, items)]
        parts = [self._rows(decodes, size).ravel(), rows.ravel(), spans.ravel(), tables.ravel(), *told]
        return MixedStep(size, items, np.concatenate([*parts, *self._updates(decodes)]))

    def _rows(self, items: Sequence[BatchItem], size: int) -> Array:
        width = self._width
        rows = np.repeat(PADDING[:, None], size, axis=1)
        told = [
            (
                item.token_ids[0],
                item.start,
                item.tables[0][item.start // width] * width + item.start % width,
                item.start + 1,
                -1 if item.previous is None else item.previous,
            )
            for item in items
        ]
        rows[:, : len(items)] = np.array(told, np.int64).reshape(-1, len(PADDING)).T
        return rows

    def _updates(self, items: Sequence[BatchItem]) -> tuple[Array, Array]:
        """Places in the flattened block tables, and what stands there from now on."""
        at: list[int] = []
        values: list[int] = []
        for row, item in enumerate(items):
            block_ids = item.tables[0]
            owner, sent = self._sent[row]
            if owner is not block_ids or sent != len(block_ids):
                first = sent if owner is block_ids and sent < len(block_ids) else 0
                at.extend(range(row * self._max_blocks + first, row * self._max_blocks + len(block_ids)))
                values.extend(block_ids[first:])
                self._sent[row] = (block_ids, len(block_ids))
        return np.array(at, np.int64), np.array(values, np.int64)


def _is_decode(item: BatchItem) -> bool:
    return len(item.token_ids) == 1 == item.num_sampled and not item.want_prompt_logprobs and item.export_key is None


def _fit(chunks: Sequence[BatchItem], limits: ChunkLimits) -> bool:
    """Whether there is room for `chunks`, of which half would not be padding."""
    num_tokens = sum(len(item.token_ids) for item in chunks)
    context = sum(gathered_tokens(item.start + len(item.token_ids)) for item in chunks)
    plain = not any(
        item.want_prompt_logprobs or item.export_key is not None or item.previous is not None for item in chunks
    )
    enough = limits.num_tokens < 2 * num_tokens <= 2 * limits.num_tokens
    return plain and enough and len(chunks) <= limits.num_seqs and context <= limits.max_context


def _smallest(sizes: Sequence[int], least: int) -> int | None:
    at = bisect.bisect_left(sizes, least)
    return sizes[at] if at < len(sizes) else None

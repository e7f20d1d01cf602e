"""Paged attention in torch: what runs on the CPU, and on a GPU without Triton.

Decodes are attended in groups: one gather lays a group's blocks out as dense keys and values, padded to its longest
sequence. A prefill that starts at position 0 needs no gather; one over a cached prefix gathers that sequence only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pd_kernels.paged_attention.batch import PagedBatch

# Rows of queries that share one mask when a prefill attends over a prefix: bounds the mask, and skips the keys that
# no row of the chunk may see.
_QUERY_CHUNK = 256
# A group of decodes is closed once it would hold more padding than this many blocks and half its data.
_MAX_PADDING_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences [`start`, `stop`): where their cache rows are in layer 0, and which gathered tokens are padding: by a
    mask to add, and as (sequences, positions)."""

    start: int
    stop: int
    rows: Tensor
    mask: Tensor
    padding: tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence's new tokens [`start`, `stop`) of the step; `rows` is None if nothing is cached before them."""

    start: int
    stop: int
    num_cached: int
    rows: Tensor | None


class TorchPlan:
    """See `pd_kernels.paged_attention.plan`."""

    def __init__(self, batch: PagedBatch, pool: Tensor, num_heads: int, dtype: torch.dtype) -> None:
        if batch.slots is not None:
            raise ValueError("prefills in slots need the triton backend")
        self._num_heads, self._dtype = num_heads, dtype
        self._num_layers, _, self._num_kv_heads, self._tokens_per_block, self._head_dim = pool.shape[1:]
        # A row is one head's keys or values of one block and layer, so a gather of rows in any order is one copy.
        self._pool_rows = pool.view(-1, self._tokens_per_block * self._head_dim)
        self._groups = [self._plan_group(batch, *span) for span in self._spans(batch)]
        self._prefills = self._plan_prefills(batch)

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        q_size = self._num_heads * self._head_dim
        out = torch.empty((qkv.shape[0], q_size), dtype=qkv.dtype, device=qkv.device)
        for group in self._groups:
            out[group.start : group.stop] = self._decode(qkv[group.start : group.stop, :q_size], group, layer)
        for prefill in self._prefills:
            out[prefill.start : prefill.stop] = self._prefill(qkv[prefill.start : prefill.stop], prefill, layer)
        return out

    def _spans(self, batch: PagedBatch) -> list[tuple[int, int]]:
        """Split the decodes into runs of neighbours whose padding stays small."""
        spans, start, widest, total = [], 0, 0, 0
        for index in range(batch.num_decodes):
            num_blocks = self._num_blocks(batch.seq_lens[index])
            padding = max(widest, num_blocks) * (index + 1 - start) - (total + num_blocks)
            if padding > max(_MAX_PADDING_BLOCKS, (total + num_blocks) // 2):
                spans.append((start, index))
                start, widest, total = index, 0, 0
            widest, total = max(widest, num_blocks), total + num_blocks
        if start < batch.num_decodes:
            spans.append((start, batch.num_decodes))
        return spans

    def _plan_group(self, batch: PagedBatch, start: int, stop: int) -> _DecodeGroup:
        num_blocks = max(1, self._num_blocks(max(batch.seq_lens[start:stop])))
        rows = self._rows(batch.block_tables[start:stop, :num_blocks])
        positions = torch.arange(num_blocks * self._tokens_per_block, device=rows.device)
        padding = positions >= batch.seq_lens_tensor[start:stop, None]
        mask = torch.zeros(padding.shape, dtype=self._dtype, device=rows.device).masked_fill_(padding, float("-inf"))
        sequences, at = padding.nonzero(as_tuple=True)
        return _DecodeGroup(start, stop, rows, mask[:, None, None], (sequences, at))

    def _plan_prefills(self, batch: PagedBatch) -> list[_Prefill]:
        prefills, start = [], batch.num_decodes
        for index in range(batch.num_decodes, len(batch.q_lens)):
            stop = start + batch.q_lens[index]
            num_cached = batch.seq_lens[index] - batch.q_lens[index]
            num_blocks = self._num_blocks(batch.seq_lens[index])
            rows = self._rows(batch.block_tables[index : index + 1, :num_blocks]) if num_cached else None
            prefills.append(_Prefill(start, stop, num_cached, rows))
            start = stop
        return prefills

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_block)

    def _rows(self, block_tables: Tensor) -> Tensor:
        """Rows of layer 0, [2 * num_seqs * num_kv_heads * num_blocks], for tables [num_seqs, num_blocks]."""
        heads = torch.arange(2 * self._num_kv_heads, device=block_tables.device).view(2, 1, self._num_kv_heads, 1)
        first = block_tables.to(torch.int64) * (self._num_layers * 2 * self._num_kv_heads)
        return (first[None, :, None, :] + heads).flatten()

    def _gather(self, rows: Tensor, layer: int, num_seqs: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [num_seqs, num_kv_heads, padded length, head_dim]."""
        rows = rows + layer * 2 * self._num_kv_heads
        gathered = self._pool_rows.index_select(0, rows).to(self._dtype)
        keys, values = gathered.view(2, num_seqs, self._num_kv_heads, -1, self._head_dim).unbind(0)
        return keys, values

    def _decode(self, q: Tensor, group: _DecodeGroup, layer: int) -> Tensor:
        num_seqs = group.stop - group.start
        keys, values = self._gather(group.rows, layer, num_seqs)
        # What another sequence has left there may be NaN, which no weight of zero takes away.
        sequences, at = group.padding
        keys[sequences, :, at] = 0
        values[sequences, :, at] = 0
        # The query heads that share a key head become rows of one small matrix, so keys are never repeated.
        q = q.view(num_seqs, self._num_kv_heads, -1, self._head_dim)
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask).reshape(num_seqs, -1)

    def _prefill(self, qkv: Tensor, prefill: _Prefill, layer: int) -> Tensor:
        heads = qkv.view(1, qkv.shape[0], -1, self._head_dim).transpose(1, 2)
        q = heads[:, : self._num_heads]
        if prefill.rows is None:
            keys, values = heads[:, self._num_heads :].chunk(2, dim=1)
            out = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
        else:
            keys, values = self._gather(prefill.rows, layer, 1)
            chunks = range(0, q.shape[2], _QUERY_CHUNK)
            out = torch.cat([self._over_prefix(q, keys, values, prefill.num_cached, at) for at in chunks], dim=2)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)

    def _over_prefix(self, q: Tensor, keys: Tensor, values: Tensor, num_cached: int, at: int) -> Tensor:
        """Queries [`at`, `at` + chunk) over everything up to the last of them."""
        q = q[:, :, at : at + _QUERY_CHUNK]
        positions = num_cached + at + torch.arange(q.shape[2], device=q.device)
        length = num_cached + at + q.shape[2]
        visible = torch.arange(length, device=q.device) <= positions[:, None]
        keys, values = keys[:, :, :length], values[:, :, :length]
        return functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible, enable_gqa=True)

"""Paged attention in torch: the oracle, and what runs on the CPU, and on a GPU without Triton.

Decodes are attended in groups: one gather lays a group's blocks out as dense keys and values, padded to its longest
sequence. A prefill that starts at position 0 needs no gather; one over a cached prefix gathers that sequence only.
Blocks that are wholly before a window are never gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pd_kernels.paged_attention.batch import PagedBatch
from pd_kernels.paged_attention.spec import AttentionSpec

# Rows of queries that share one mask when a prefill attends over a prefix: bounds the mask, and skips the keys that
# no row of the chunk may see.
_QUERY_CHUNK = 256
# A group of decodes is closed once it would hold more padding than this many blocks and half its data.
_MAX_PADDING_BLOCKS = 16


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences [`start`, `stop`): where their cache rows are in layer 0, and which gathered tokens the new ones see.

    Args:
        mask: [stop - start, 1, 1, num_gathered]: what to add to scores, in the type of the queries.
        unseen: the others, as (sequences, gathered tokens).
        distances: [stop - start, num_gathered]: a gathered token's position less the new one's; None if not needed.
    """

    start: int
    stop: int
    rows: Tensor
    mask: Tensor
    unseen: tuple[Tensor, Tensor]
    distances: Tensor | None


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence's new tokens [`start`, `stop`) of the step.

    `rows` are where its cache is in layer 0, from the token at `first_key` on; None if nothing is cached.
    """

    start: int
    stop: int
    num_cached: int
    first_key: int
    rows: Tensor | None


class TorchPlan:
    """See `pd_kernels.paged_attention.plan`."""

    def __init__(self, batch: PagedBatch, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> None:
        if batch.prefill_room is not None:
            raise ValueError("prefills in a captured step need the triton backend")
        self._spec, self._dtype = spec, dtype
        self._is_plain = not spec.extras
        # torch's own attention knows masks, and no other way from scores to weights.
        self._by_hand = any(extra != "window" for extra in spec.extras)
        self._num_layers, _, _, self._tokens_per_block, _ = pool.shape[1:]
        # A row is one head's keys or values of one block and layer, so a gather of rows in any order is one copy.
        self._pool_rows = pool.view(-1, self._tokens_per_block * spec.qk_dim)
        self._groups = [self._plan_group(batch, *span) for span in self._spans(batch)]
        self._prefills = self._plan_prefills(batch)

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        q_size = self._spec.num_heads * self._spec.qk_dim
        out = torch.empty((qkv.shape[0], self._spec.out_width), dtype=qkv.dtype, device=qkv.device)
        for group in self._groups:
            out[group.start : group.stop] = self._decode(qkv[group.start : group.stop, :q_size], group, layer)
        for prefill in self._prefills:
            out[prefill.start : prefill.stop] = self._prefill(qkv[prefill.start : prefill.stop], prefill, layer)
        return out

    def _spans(self, batch: PagedBatch) -> list[tuple[int, int, int]]:
        """Split the decodes into runs of neighbours whose padding stays small: [start, stop), and the most blocks."""
        spans, start, widest, total = [], 0, 0, 0
        for index in range(batch.num_decodes):
            num_blocks = self._num_seen_blocks(batch.seq_lens[index])
            padding = max(widest, num_blocks) * (index + 1 - start) - (total + num_blocks)
            if padding > max(_MAX_PADDING_BLOCKS, (total + num_blocks) // 2):
                spans.append((start, index, widest))
                start, widest, total = index, 0, 0
            widest, total = max(widest, num_blocks), total + num_blocks
        if start < batch.num_decodes:
            spans.append((start, batch.num_decodes, widest))
        return spans

    def _plan_group(self, batch: PagedBatch, start: int, stop: int, num_blocks: int) -> _DecodeGroup:
        num_blocks = max(1, num_blocks)
        lengths = batch.seq_lens_tensor[start:stop, None]
        positions = torch.arange(num_blocks * self._tokens_per_block, device=lengths.device)
        if self._spec.window is None:
            rows = self._rows(batch.block_tables[start:stop, :num_blocks])
        else:
            tables = batch.block_tables[start:stop]
            first_blocks = (lengths - self._spec.window).clamp(min=0) // self._tokens_per_block
            columns = first_blocks + torch.arange(num_blocks, device=tables.device)
            # Past a table's end, and in a padding row's table, which may name no block, anything goes: it is unseen.
            rows = self._rows(tables.gather(1, columns.clamp(max=tables.shape[1] - 1)).clamp(min=0))
            positions = positions + first_blocks * self._tokens_per_block
        unseen = positions >= lengths
        if self._spec.window is not None:
            unseen |= positions < lengths - self._spec.window
        mask = torch.zeros(unseen.shape, dtype=self._dtype, device=rows.device).masked_fill_(unseen, float("-inf"))
        sequences, at = unseen.nonzero(as_tuple=True)
        distances = positions - lengths + 1 if self._by_hand else None
        return _DecodeGroup(start, stop, rows, mask[:, None, None], (sequences, at), distances)

    def _plan_prefills(self, batch: PagedBatch) -> list[_Prefill]:
        prefills, start = [], batch.num_decodes
        for index in range(batch.num_decodes, len(batch.q_lens)):
            stop = start + batch.q_lens[index]
            num_cached = batch.seq_lens[index] - batch.q_lens[index]
            first_block = self._spec.first_key(num_cached) // self._tokens_per_block
            blocks = slice(first_block, self._num_blocks(batch.seq_lens[index]))
            rows = self._rows(batch.block_tables[index : index + 1, blocks]) if num_cached else None
            prefills.append(_Prefill(start, stop, num_cached, first_block * self._tokens_per_block, rows))
            start = stop
        return prefills

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._tokens_per_block)

    def _num_seen_blocks(self, seq_len: int) -> int:
        """Blocks of the tokens that a sequence's newest one sees."""
        return self._num_blocks(seq_len) - self._spec.first_key(seq_len - 1) // self._tokens_per_block

    def _rows(self, block_tables: Tensor) -> Tensor:
        """Rows of layer 0, [2 * num_seqs * num_kv_heads * num_blocks], for tables [num_seqs, num_blocks]."""
        num_kv_heads = self._spec.num_kv_heads
        heads = torch.arange(2 * num_kv_heads, device=block_tables.device).view(2, 1, num_kv_heads, 1)
        first = block_tables.to(torch.int64) * (self._num_layers * 2 * num_kv_heads)
        return (first[None, :, None, :] + heads).flatten()

    def _gather(self, rows: Tensor, layer: int, num_seqs: int) -> tuple[Tensor, Tensor]:
        """Keys and values, each [num_seqs, num_kv_heads, padded length, head_dim]."""
        rows = rows + layer * 2 * self._spec.num_kv_heads
        gathered = self._pool_rows.index_select(0, rows).to(self._dtype)
        keys, values = gathered.view(2, num_seqs, self._spec.num_kv_heads, -1, self._spec.qk_dim).unbind(0)
        return keys, values

    def _decode(self, q: Tensor, group: _DecodeGroup, layer: int) -> Tensor:
        num_seqs, spec = group.stop - group.start, self._spec
        keys, values = self._gather(group.rows, layer, num_seqs)
        # What another sequence has left there may be NaN, which no weight of zero takes away.
        sequences, at = group.unseen
        keys[sequences, :, at] = 0
        values[sequences, :, at] = 0
        # The query heads that share a key head become rows of one small matrix, so keys are never repeated.
        q = q.view(num_seqs, spec.num_kv_heads, spec.group, spec.qk_dim)
        if group.distances is not None:
            out = self._weigh(q[:, :, :, None], keys, values, group.distances[:, None, None, None], layer)
        else:
            out = functional.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=spec.scale)
        return out.reshape(num_seqs, -1)

    def _prefill(self, qkv: Tensor, prefill: _Prefill, layer: int) -> Tensor:
        spec = self._spec
        heads = qkv.view(1, qkv.shape[0], -1, spec.qk_dim).transpose(1, 2)
        q = heads[:, : spec.num_heads]
        if prefill.rows is None:
            keys, values = heads[:, spec.num_heads :].chunk(2, dim=1)
        else:
            keys, values = self._gather(prefill.rows, layer, 1)
        if prefill.rows is None and self._is_plain:
            out = functional.scaled_dot_product_attention(
                q, keys, values, is_causal=True, scale=spec.scale, enable_gqa=True
            )
        else:
            chunks = range(0, q.shape[2], _QUERY_CHUNK)
            out = torch.cat([self._over_prefix(q, keys, values, prefill, at, layer) for at in chunks], dim=2)
        return out.transpose(1, 2).reshape(qkv.shape[0], -1)

    def _over_prefix(self, q: Tensor, keys: Tensor, values: Tensor, prefill: _Prefill, at: int, layer: int) -> Tensor:
        """Queries [`at`, `at` + chunk) over everything from what the first of them sees to the last of them."""
        spec, q = self._spec, q[:, :, at : at + _QUERY_CHUNK]
        first = prefill.num_cached + at
        begin, end = spec.first_key(first), first + q.shape[2]
        positions = torch.arange(first, end, device=q.device)
        distances = torch.arange(begin, end, device=q.device) - positions[:, None]
        span = slice(begin - prefill.first_key, end - prefill.first_key)
        keys, values = keys[:, :, span], values[:, :, span]
        if self._by_hand:
            grouped = q.reshape(1, spec.num_kv_heads, spec.group, q.shape[2], spec.qk_dim)
            return self._weigh(grouped, keys, values, distances, layer).flatten(1, 2)
        visible = self._is_seen(distances)
        return functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=visible, scale=spec.scale, enable_gqa=True
        )

    def _is_seen(self, distances: Tensor) -> Tensor:
        """Whether a token sees keys so far from it; those of earlier ones are negative."""
        seen = distances <= 0
        return seen if self._spec.window is None else seen & (distances > -self._spec.window)

    def _weigh(self, q: Tensor, keys: Tensor, values: Tensor, distances: Tensor, layer: int) -> Tensor:
        """Attention in float32, with all that a spec may ask for.

        Args:
            q: [n, num_kv_heads, group, num_tokens, head_dim].
            keys, values: [n, num_kv_heads, num_keys, head_dim].
            distances: a key's position less a token's, broadcastable to [n, num_kv_heads, group, num_tokens, num_keys].
        """
        spec = self._spec
        scores = q.float() @ keys.float().transpose(2, 3)[:, :, None] * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if spec.alibi is not None:
            scores = scores + spec.alibi.view(spec.num_kv_heads, -1, 1, 1) * distances
        seen = self._is_seen(distances)
        scores = scores.masked_fill(~seen, float("-inf"))
        if spec.sinks is None:
            # A padding row sees nothing: its weights are zeros, and so is its output.
            weights = scores.softmax(-1).masked_fill(~seen, 0.0)
        else:
            sinks = spec.sinks[layer].view(spec.num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
        return (weights @ values.float()[:, :, None]).to(q.dtype)


plan = TorchPlan


def declines(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `pd_kernels.paged_attention.declines`: it honours everything."""
    return None


def prepare(pool: Tensor, spec: AttentionSpec, dtype: torch.dtype, max_tokens: int, max_seq_len: int | None) -> None:
    """See `pd_kernels.paged_attention.prepare`: there is nothing to do."""


def workspace_bytes(
    spec: AttentionSpec, dtype: torch.dtype, device: torch.device, max_tokens: int, max_seqs: int, max_seq_len: int
) -> int:
    """See `pd_kernels.paged_attention.workspace_bytes`: what torch takes is among the step's activations."""
    return 0

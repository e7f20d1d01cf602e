"""A batch over a paged cache, and what attention over it must give: dense attention in double precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pd_kernels.paged_attention import AttentionSpec, PagedBatch
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LAYER, NUM_LAYERS = 1, 2

# (new tokens, tokens in the cache before them) of each sequence, decodes first.
DECODES = [(1, 40), (1, 17), (1, 16), (1, 3), (1, 0)]
PREFILLS = [(7, 0), (1 + 16, 16), (33, 5), (2, 30)]
SHAPES = [(1, 1, 16), (4, 4, 8), (6, 2, 80), (9, 3, 64), (5, 1, 256), (40, 2, 16)]

AnyPlan: TypeAlias = type[TorchPlan] | type[TritonPlan]


class Case:
    """A batch with scattered blocks in a pool of noise, and what attention over it must give.

    Args:
        shape: query heads, key heads, head size.
        cache_dtype: of the pool, by default `dtype`.
        changes: of the spec, which is plain otherwise.
    """

    def __init__(
        self, seqs: list[tuple[int, int]], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device,
        tokens_per_block: int = 16, cache_dtype: torch.dtype | None = None, **changes: Any,
    ) -> None:  # fmt: skip
        self.num_heads, num_kv_heads, head_dim = shape
        self.spec = replace(AttentionSpec.plain(*shape), **changes)
        q_lens = [q_len for q_len, _ in seqs]
        seq_lens = [q_len + cached for q_len, cached in seqs]
        counts = [math.ceil(n / tokens_per_block) for n in seq_lens]
        num_blocks = sum(counts) + 2
        self.pool = torch.randn(num_blocks, NUM_LAYERS, 2, num_kv_heads, tokens_per_block, head_dim, device=device)
        self.pool = self.pool.to(cache_dtype or dtype)
        self.qkv = torch.randn(sum(q_lens), (self.num_heads + 2 * num_kv_heads) * head_dim, device=device).to(dtype)
        ids = torch.randperm(num_blocks, device=device)
        tables = torch.zeros(len(seqs), max(counts), dtype=torch.int64, device=device)
        starts = torch.tensor([0, *q_lens], device=device).cumsum(0)
        expected, used = [], 0
        for row, (q_len, seq_len, count) in enumerate(zip(q_lens, seq_lens, counts, strict=True)):
            tables[row, :count] = ids[used : used + count]
            used += count
            expected.append(self._attend(tables[row, :count], int(starts[row]), q_len, seq_len))
        self.expected = torch.cat(expected).to(dtype)
        self.batch = PagedBatch(q_lens, seq_lens, starts, torch.tensor(seq_lens, device=device), tables)

    def _attend(self, blocks: Tensor, start: int, q_len: int, seq_len: int) -> Tensor:
        """Write the sequence's new keys and values to the cache, then attend densely.

        A prompt with nothing cached attends over what was written, all else over what the cache made of it.
        """
        num_kv_heads, tokens_per_block, head_dim = self.pool.shape[3:]
        heads = self.qkv[start : start + q_len].view(q_len, -1, head_dim)
        new = heads[:, self.num_heads :].view(q_len, 2, num_kv_heads, head_dim)
        for index, position in enumerate(range(seq_len - q_len, seq_len)):
            block, slot = blocks[position // tokens_per_block], position % tokens_per_block
            self.pool[block, LAYER, :, :, slot] = new[index].to(self.pool.dtype)
        if q_len == seq_len > 1:
            kv = new.transpose(0, 2).double()
        else:
            kv = self.pool[blocks, LAYER].double().transpose(0, 2).flatten(2, 3)[:, :, :seq_len]
        keys, values = kv.repeat_interleave(self.num_heads // num_kv_heads, dim=0).unbind(1)
        weights = self._weights(heads[:, : self.num_heads].double().transpose(0, 1) @ keys.transpose(1, 2))
        return (weights @ values).transpose(0, 1).flatten(1)

    def _weights(self, products: Tensor) -> Tensor:
        """What the spec makes of queries times keys, [num_heads, q_len, seq_len]."""
        spec, (_, q_len, seq_len) = self.spec, products.shape
        scores = products * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        positions = torch.arange(seq_len, device=scores.device)
        behind = positions[seq_len - q_len :, None] - positions
        if spec.alibi is not None:
            scores = scores - spec.alibi.double()[:, None, None] * behind
        scores = scores.masked_fill((behind < 0) | (behind >= (spec.window or seq_len)), float("-inf"))
        if spec.sinks is None:
            return scores.softmax(-1)
        sinks = spec.sinks[LAYER].double()[:, None, None].expand(-1, q_len, 1)
        return torch.cat([sinks, scores], -1).softmax(-1)[..., 1:]

    def free(self) -> None:
        """Take away the blocks that no new token sees, and poison all that stands before what they see."""
        tokens_per_block = self.pool.shape[4]
        for row, (q_len, seq_len) in enumerate(zip(self.batch.q_lens, self.batch.seq_lens, strict=True)):
            first_key = self.spec.first_key(seq_len - q_len)
            blocks = self.batch.block_tables[row]
            for position in range(first_key):
                block = int(blocks[position // tokens_per_block])
                self.pool[block, :, :, :, position % tokens_per_block] = float("nan")
            blocks[: first_key // tokens_per_block] = -1

    def run(self, plan: AnyPlan) -> Tensor:
        return plan(self.batch, self.pool, self.spec, self.qkv.dtype).run(self.qkv, LAYER)

    def check(self, plan: AnyPlan) -> None:
        out = self.run(plan)
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out, self.expected, rtol=tolerance, atol=tolerance)

    def decode(self, num_splits: int, min_tiles: int = 1) -> DecodeAttention:
        batch = self.batch
        return DecodeAttention(
            batch.seq_lens_tensor, batch.block_tables, self.pool, len(batch.q_lens), self.spec, num_splits,
            min_tiles,
        )  # fmt: skip

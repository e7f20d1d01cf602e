"""Paged attention on a GPU: a step's decodes go to `decode_kernel`, its prefills to `prefill`."""

from __future__ import annotations

import torch
from torch import Tensor, empty

from pd_kernels.paged_attention.batch import PagedBatch
from pd_kernels.paged_attention.captured_prefill import CapturedPrefill
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.layout import Heads
from pd_kernels.paged_attention.prefill import PrefillAttention


class TritonPlan:
    """See `pd_kernels.paged_attention.plan`."""

    def __init__(self, batch: PagedBatch, pool: Tensor, num_heads: int, dtype: torch.dtype) -> None:
        if not pool.is_contiguous():
            raise ValueError("the pool must be dense")
        self._out_width = num_heads * pool.shape[5]
        self._decodes: DecodeAttention | None = None
        self._prefills: PrefillAttention | CapturedPrefill | None = None
        heads = Heads(num_heads, pool.shape[3], pool.shape[5])
        if batch.num_decodes:
            self._decodes = DecodeAttention(
                batch.seq_lens_tensor, batch.block_tables, pool, batch.num_decodes, num_heads
            )
        if batch.slots is not None:
            self._prefills = CapturedPrefill(batch.slots, pool, heads, dtype)
        elif batch.num_decodes < len(batch.q_lens):
            self._prefills = PrefillAttention(batch, pool, heads, dtype)

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        if isinstance(self._prefills, PrefillAttention) and (out := self._prefills.run_alone(qkv)) is not None:
            return out
        out = empty((qkv.shape[0], self._out_width), dtype=qkv.dtype, device=qkv.device)
        if self._decodes:
            self._decodes.run(qkv, layer, out)
        if self._prefills:
            self._prefills.run(qkv, layer, out)
        return out

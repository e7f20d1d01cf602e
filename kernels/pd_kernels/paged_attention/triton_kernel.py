"""The "triton" backend, for GPUs: a step's decodes go to `decode_kernel`, its prefills to `prefill`."""

from __future__ import annotations

import torch
from torch import Tensor, empty

from pd_kernels.paged_attention import decode_kernel, prefill
from pd_kernels.paged_attention.batch import PagedBatch
from pd_kernels.paged_attention.captured_prefill import CapturedPrefill
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.prefill import PrefillAttention
from pd_kernels.paged_attention.spec import AttentionSpec


class TritonPlan:
    """See `pd_kernels.paged_attention.plan`."""

    def __init__(self, batch: PagedBatch, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> None:
        if not pool.is_contiguous():
            raise ValueError("the pool must be dense")
        self._out_width = spec.out_width
        self._decodes: DecodeAttention | None = None
        self._prefills: PrefillAttention | CapturedPrefill | None = None
        if batch.num_decodes:
            self._decodes = DecodeAttention(batch.seq_lens_tensor, batch.block_tables, pool, batch.num_decodes, spec)
        if batch.prefill_room is not None:
            self._prefills = CapturedPrefill(batch.prefill_room, pool, spec, dtype)
        elif batch.num_decodes < len(batch.q_lens):
            self._prefills = PrefillAttention(batch, pool, spec, dtype)

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        if isinstance(self._prefills, PrefillAttention) and (out := self._prefills.run_alone(qkv)) is not None:
            return out
        out = empty((qkv.shape[0], self._out_width), dtype=qkv.dtype, device=qkv.device)
        if self._decodes:
            self._decodes.run(qkv, layer, out)
        if self._prefills:
            self._prefills.run(qkv, layer, out)
        return out


plan = TritonPlan


def declines(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """See `pd_kernels.paged_attention.declines`."""
    return "Triton needs a GPU" if device.type == "cpu" else None


def prepare(pool: Tensor, spec: AttentionSpec, dtype: torch.dtype, max_tokens: int, max_seq_len: int | None) -> None:
    """See `pd_kernels.paged_attention.prepare`."""
    num_slots = pool.shape[0] * pool.shape[4]
    longest = min(max_seq_len or num_slots, num_slots)
    prefill.prepare(pool, spec, dtype, min(max_tokens, longest), longest)


def workspace_bytes(
    spec: AttentionSpec, dtype: torch.dtype, device: torch.device, max_tokens: int, max_seqs: int, max_seq_len: int
) -> int:
    """See `pd_kernels.paged_attention.workspace_bytes`."""
    prefill_bytes = prefill.workspace_bytes(spec, dtype, max_tokens, max_seq_len)
    return prefill_bytes + decode_kernel.workspace_bytes(spec, device, max_seqs)

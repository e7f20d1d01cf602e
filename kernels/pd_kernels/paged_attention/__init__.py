"""Causal attention of a step's new tokens over the paged KV cache, prefill and decode in one batch.

A step makes one plan (index arithmetic, masks, launch shapes) and runs it once per layer, after the layer's keys and
values were written to the cache (`pd_kernels.rope_cache`).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from pd_kernels.paged_attention.batch import PagedBatch, PrefillSlots
from pd_kernels.paged_attention.layout import gathered_tokens
from pd_kernels.paged_attention.reference import TorchPlan

Backend = Literal["torch", "triton"]


class Plan(Protocol):
    """What `plan` returns: the attention of one step, for any layer."""

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        """Attention output [num_tokens, num_heads * head_dim].

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], after rotary embedding; dense rows.
            layer: which layer of the pool holds the sequences' keys and values, the new tokens' included.
        """
        ...


def plan(batch: PagedBatch, pool: Tensor, num_heads: int, backend: Backend, dtype: torch.dtype | None = None) -> Plan:
    """Prepare a step's attention; the scale is 1 / sqrt(head_dim).

    What a step's new tokens attend to: a decode, and a prefill over cached tokens, to what the pool holds, the new
    tokens' own keys and values included; a prompt with nothing cached to those of the step, which are exact also where
    the pool is coarser.

    Args:
        pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense, on the batch's device, of
            float32, bfloat16, float16 or float8_e4m3fn (read as it is: no scale). What slots hold
            that none of a sequence's tokens was written to does not matter, NaN included.
        num_heads: query heads, a multiple of num_kv_heads.
        dtype: of the queries and of all arithmetic but sums, which are float32; by default the pool's, and bfloat16
            over an 8-bit pool.
    """
    dtype = dtype or _default_dtype(pool)
    if backend == "triton":
        from pd_kernels.paged_attention.triton_kernel import TritonPlan

        return TritonPlan(batch, pool, num_heads, dtype)
    return TorchPlan(batch, pool, num_heads, dtype)


def prepare(
    pool: Tensor, num_heads: int, max_tokens: int, backend: Backend,
    dtype: torch.dtype | None = None, max_seq_len: int | None = None,
) -> None:  # fmt: skip
    """Do now what plans would otherwise do while a request waits; steps have up to `max_tokens` tokens.

    On a GPU this compiles kernels, and has cuDNN prepare its shapes for the calling thread: run plans on the same one.

    Args:
        dtype: see `plan`.
        max_seq_len: tokens of the longest sequence, by default as many as the pool holds. The fewer, the faster.
    """
    if backend == "triton":
        from pd_kernels.paged_attention import prefill
        from pd_kernels.paged_attention.layout import Heads

        heads = Heads(num_heads, pool.shape[3], pool.shape[5])
        num_slots = pool.shape[0] * pool.shape[4]
        longest = min(max_seq_len or num_slots, num_slots)
        prefill.prepare(pool, heads, dtype or _default_dtype(pool), min(max_tokens, longest), longest)


def prefill_workspace_bytes(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, max_tokens: int, max_seq_len: int
) -> int:
    """Most memory that plans of the "triton" backend take for prefills of `max_tokens` tokens, beside their output.

    Args:
        dtype: of the queries.
        max_seq_len: tokens of the longest sequence.
    """
    from pd_kernels.paged_attention import prefill
    from pd_kernels.paged_attention.layout import Heads

    return prefill.workspace_bytes(Heads(num_heads, num_kv_heads, head_dim), dtype, max_tokens, max_seq_len)


def _default_dtype(pool: Tensor) -> torch.dtype:
    return torch.bfloat16 if pool.dtype == torch.float8_e4m3fn else pool.dtype


__all__ = [
    "Backend",
    "PagedBatch",
    "Plan",
    "PrefillSlots",
    "gathered_tokens",
    "plan",
    "prefill_workspace_bytes",
    "prepare",
]

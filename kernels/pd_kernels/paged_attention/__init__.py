"""Causal attention of a step's new tokens over the paged KV cache, prefill and decode in one batch.

A step makes one plan (index arithmetic, masks, launch shapes) and runs it once per layer, after the layer's keys and
values were written to the cache (`pd_kernels.rope_cache`).
"""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from pd_kernels.paged_attention.batch import PagedBatch
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


def plan(batch: PagedBatch, pool: Tensor, num_heads: int, backend: Backend) -> Plan:
    """Prepare a step's attention; the scale is 1 / sqrt(head_dim).

    Args:
        pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense, on the batch's device.
            Slots that no token was written to must hold finite values.
        num_heads: query heads, a multiple of num_kv_heads.
    """
    if backend == "triton":
        from pd_kernels.paged_attention.triton_kernel import TritonPlan

        return TritonPlan(batch, pool, num_heads)
    return TorchPlan(batch, pool, num_heads)


def prepare(pool: Tensor, num_heads: int, max_tokens: int, backend: Backend) -> None:
    """Do now what attention would otherwise do at the first prompt of a length; prompts have up to `max_tokens`."""
    if backend == "triton":
        from pd_kernels.paged_attention import fresh_prefill

        if fresh_prefill.is_supported(pool):
            fresh_prefill.prepare(pool, num_heads, max_tokens)


__all__ = ["Backend", "PagedBatch", "Plan", "plan", "prepare"]

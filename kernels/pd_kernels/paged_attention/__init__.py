"""Causal attention of a step's new tokens over the paged KV cache, prefill and decode in one batch.

A model says what kind of attention its layers have (`AttentionSpec`). A step makes one plan for each kind (index
arithmetic, masks, launch shapes) and runs it once per layer, after the layer's keys and values were written to the
cache (`pd_kernels.rope_cache`). A backend is a module of this package that has the functions of `_Module` and a line in
`_MODULES`; it honours a spec whole or declines it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from pd_kernels.paged_attention.batch import PagedBatch, PrefillRoom
from pd_kernels.paged_attention.layout import gathered_tokens
from pd_kernels.paged_attention.spec import AttentionSpec

Backend = Literal["torch", "triton"]
_MODULES: dict[Backend, str] = {"torch": "reference", "triton": "triton_kernel"}


class Plan(Protocol):
    """What `plan` returns: the attention of one step, for any layer."""

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        """Attention output [num_tokens, num_heads * v_dim].

        Args:
            qkv: [num_tokens, spec.qkv_width], after rotary embedding; dense rows.
            layer: which layer of the pool holds the sequences' keys and values, the new tokens' included.
        """
        ...


class _Module(Protocol):
    """A backend; see the functions of the same names below."""

    def declines(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None: ...

    def plan(self, batch: PagedBatch, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> Plan: ...

    def prepare(
        self, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype, max_tokens: int, max_seq_len: int | None
    ) -> None: ...

    def workspace_bytes(
        self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device, max_tokens: int, max_seqs: int,
        max_seq_len: int,
    ) -> int: ...  # fmt: skip


@cache
def _module(backend: Backend) -> _Module:
    return cast(_Module, import_module(f"{__name__}.{_MODULES[backend]}"))


def declines(spec: AttentionSpec, backend: Backend, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `backend` does not attend as `spec` asks, for queries of `dtype` on `device`; None: it does.

    A model asks once for each of its specs, before it makes plans.
    """
    if spec.v_dim != spec.qk_dim:
        return f"the cache has one size of heads, not {spec.qk_dim} for keys and {spec.v_dim} for values"
    return _module(backend).declines(spec, dtype, device)


def plan(
    batch: PagedBatch, pool: Tensor, spec: AttentionSpec, backend: Backend, dtype: torch.dtype | None = None
) -> Plan:
    """Prepare a step's attention with a backend that does not decline `spec`.

    What a step's new tokens attend to: a decode, and a prefill over cached tokens, to what the pool holds, the new
    tokens' own keys and values included; a prompt with nothing cached to those of the step, which are exact also where
    the pool is coarser.

    Args:
        pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense, on the batch's device, of
            float32, bfloat16, float16 or float8_e4m3fn (read as it is: no scale). What slots hold
            that none of a sequence's tokens was written to does not matter, NaN included.
        dtype: of the queries and of all arithmetic but sums, which are float32; by default the pool's, and bfloat16
            over an 8-bit pool.
    """
    return _module(backend).plan(batch, pool, spec, dtype or _default_dtype(pool))


def prepare(
    pool: Tensor, spec: AttentionSpec, max_tokens: int, backend: Backend,
    dtype: torch.dtype | None = None, max_seq_len: int | None = None,
) -> None:  # fmt: skip
    """Do now what plans would otherwise do while a request waits; steps have up to `max_tokens` tokens.

    On a GPU this compiles kernels, and has cuDNN prepare its shapes for the calling thread: run plans on the same one.

    Args:
        dtype: see `plan`.
        max_seq_len: tokens of the longest sequence, by default as many as the pool holds. The fewer, the faster.
    """
    _module(backend).prepare(pool, spec, dtype or _default_dtype(pool), max_tokens, max_seq_len)


def workspace_bytes(
    spec: AttentionSpec, backend: Backend, dtype: torch.dtype, device: torch.device, *,
    max_tokens: int, max_seqs: int, max_seq_len: int,
) -> int:  # fmt: skip
    """Most memory that a plan takes beside its output.

    Args:
        dtype: of the queries.
        max_tokens: of a step.
        max_seqs: sequences of a step.
        max_seq_len: tokens of the longest sequence.
    """
    return _module(backend).workspace_bytes(spec, dtype, device, max_tokens, max_seqs, max_seq_len)


def _default_dtype(pool: Tensor) -> torch.dtype:
    return torch.bfloat16 if pool.dtype == torch.float8_e4m3fn else pool.dtype


__all__ = [
    "AttentionSpec",
    "Backend",
    "PagedBatch",
    "Plan",
    "PrefillRoom",
    "declines",
    "gathered_tokens",
    "plan",
    "prepare",
    "workspace_bytes",
]

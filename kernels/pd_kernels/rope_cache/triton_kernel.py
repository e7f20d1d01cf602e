"""Rotary embedding and cache write in Triton: a program owns some heads of one token; arithmetic in float32.

Without angles nothing is rotated, and programs own heads of keys and values only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FLOAT8_MAX = tl.constexpr(448.0)
# Of each half of the heads that a program owns: enough bytes in flight to keep up with device memory.
_TILE_NUMEL = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _to_float8(x):  # type: ignore[no-untyped-def]
    # Not left to the conversion: what that makes of a value out of range is the target's choice.
    x = tl.clamp(x.to(tl.float32), -_FLOAT8_MAX, _FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(tl.float8e4nv)


# Not specialized: where a step's slots start, because each specialization is compiled while requests wait.
@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])  # type: ignore[untyped-decorator,unused-ignore]
def _rope_and_cache_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, layer_ptr,
    qkv_stride, block_stride, num_heads, num_kv_heads, tokens_per_block,
    FIRST_HEAD: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
    SATURATE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    # All query heads, then all key heads, then all value heads.
    heads = FIRST_HEAD + tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    inside = (heads < num_heads + 2 * num_kv_heads)[:, None] & in_half[None, :]
    is_rotated = (heads < num_heads + num_kv_heads)[:, None]
    first_ptrs = qkv_ptr + token * qkv_stride + (heads * (2 * HALF))[:, None] + columns[None, :]
    first = tl.load(first_ptrs, mask=inside, other=0.0)
    second = tl.load(first_ptrs + HALF, mask=inside, other=0.0)
    if cos_ptr is not None:
        cos = tl.load(cos_ptr + token * HALF + columns, mask=in_half, other=0.0)[None, :]
        sin = tl.load(sin_ptr + token * HALF + columns, mask=in_half, other=0.0)[None, :]
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = tl.where(is_rotated, (x * cos - y * sin).to(first.dtype), first)
        second = tl.where(is_rotated, (y * cos + x * sin).to(second.dtype), second)
        tl.store(first_ptrs, first, mask=inside & is_rotated)
        tl.store(first_ptrs + HALF, second, mask=inside & is_rotated)

    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        is_cached = inside & (heads >= num_heads)[:, None]
        rows = slot // tokens_per_block * block_stride
        rows += ((heads - num_heads) * tokens_per_block + slot % tokens_per_block) * (2 * HALF)
        cache_ptrs = layer_ptr + rows[:, None] + columns[None, :]
        if SATURATE:
            tl.store(cache_ptrs, _to_float8(first), mask=is_cached)
            tl.store(cache_ptrs + HALF, _to_float8(second), mask=is_cached)
        else:
            tl.store(cache_ptrs, first, mask=is_cached)
            tl.store(cache_ptrs + HALF, second, mask=is_cached)


def rope_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int
) -> None:
    if not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("cos and sin must be dense")
    _launch(qkv, cos, sin, slots, pool, layer, num_heads, 0)


def write_cache(qkv: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int) -> None:
    if pool.shape[5] % 2:
        raise ValueError(f"heads of {pool.shape[5]} elements have no halves")
    _launch(qkv, None, None, slots, pool, layer, num_heads, num_heads)


def _launch(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor, pool: Tensor, layer: int, num_heads: int,
    first_head: int,
) -> None:  # fmt: skip
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    if qkv.stride(1) != 1 or not pool.is_contiguous():
        raise ValueError("rows of qkv and the pool must be dense")
    num_kv_heads, tokens_per_block, head_dim = pool.shape[3:]
    layer_view = pool[:, layer]
    owned_heads = num_heads + 2 * num_kv_heads - first_head
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(triton.next_power_of_2(owned_heads), max(1, _TILE_NUMEL // block_half))
    _rope_and_cache_kernel[(num_tokens, triton.cdiv(owned_heads, block_heads))](
        qkv, cos, sin, slots, layer_view,
        qkv.stride(0), layer_view.stride(0), num_heads, num_kv_heads, tokens_per_block,
        FIRST_HEAD=first_head, HALF=head_dim // 2, BLOCK_HEADS=block_heads, BLOCK_HALF=block_half,
        SATURATE=pool.dtype == torch.float8_e4m3fn, num_warps=4,
    )  # fmt: skip

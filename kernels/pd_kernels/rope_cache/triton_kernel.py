"""Rotary embedding and cache write in Triton: one program a token and head, arithmetic in float32."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rope_and_cache_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, cos_ptr, sin_ptr, slots_ptr, layer_ptr,
    qkv_stride, block_stride, kv_stride,
    num_heads, num_kv_heads, tokens_per_block, half,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    head_dim = 2 * half
    columns = tl.arange(0, BLOCK)
    inside = columns < half
    first_ptrs = qkv_ptr + token * qkv_stride + head * head_dim + columns
    second_ptrs = first_ptrs + half
    first = tl.load(first_ptrs, mask=inside, other=0.0)
    second = tl.load(second_ptrs, mask=inside, other=0.0)
    if head < num_heads + num_kv_heads:
        cos = tl.load(cos_ptr + token * half + columns, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + token * half + columns, mask=inside, other=0.0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = (x * cos - y * sin).to(qkv_ptr.dtype.element_ty)
        second = (y * cos + x * sin).to(qkv_ptr.dtype.element_ty)
        tl.store(first_ptrs, first, mask=inside)
        tl.store(second_ptrs, second, mask=inside)
    if head >= num_heads:
        slot = tl.load(slots_ptr + token)
        kv_head = (head - num_heads) % num_kv_heads
        is_value = (head - num_heads) // num_kv_heads
        rows = (slot // tokens_per_block) * block_stride + is_value * kv_stride
        rows += (kv_head * tokens_per_block + slot % tokens_per_block) * head_dim
        if slot >= 0:
            tl.store(layer_ptr + rows + columns, first, mask=inside)
            tl.store(layer_ptr + rows + half + columns, second, mask=inside)


def rope_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int
) -> None:
    num_tokens = qkv.shape[0]
    if num_tokens == 0:
        return
    if qkv.stride(1) != 1 or not (cos.is_contiguous() and sin.is_contiguous() and pool.is_contiguous()):
        raise ValueError("rows of qkv, cos, sin and the pool must be dense")
    num_kv_heads, tokens_per_block, head_dim = pool.shape[3:]
    layer_view = pool[:, layer]
    _rope_and_cache_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
        qkv, cos, sin, slots, layer_view,
        qkv.stride(0), layer_view.stride(0), layer_view.stride(1),
        num_heads, num_kv_heads, tokens_per_block, head_dim // 2,
        BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip

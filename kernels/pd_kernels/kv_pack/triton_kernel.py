"""Pack and unpack as one launch each: a program copies one tile of one contiguous piece.

All are bound by memory: every word is read once and written once. Offsets are 64-bit, for a pool is often larger than
2^31 words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pd_kernels.kv_pack import KvSlice

TILE_BYTES = 16384


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _copy_rows(  # type: ignore[no-untyped-def]
    source, target, row_ids, row_words, pool_stride, SCATTER: tl.constexpr, TILE: tl.constexpr
):
    packed_row = tl.program_id(0).to(tl.int64)
    pool_row = tl.load(row_ids + packed_row).to(tl.int64)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = words < row_words
    source_row = packed_row * row_words if SCATTER else pool_row * pool_stride
    target_row = pool_row * pool_stride if SCATTER else packed_row * row_words
    values = tl.load(source + source_row + words, mask=inside)
    tl.store(target + target_row + words, values, mask=inside)


# Sizes and places that differ from message to message: a kernel compiled for each of their kinds would keep handoffs
# waiting.
@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["num_tokens", "first_token", "num_heads", "first_head", "first_layer"]
)
def _copy_slice(  # type: ignore[no-untyped-def]
    pool,
    packed,
    block_table,
    num_tokens,
    first_token,
    num_heads,
    first_head,
    first_layer,
    block_stride,
    layer_stride,
    head_stride,
    kv_factor,
    pool_heads,
    TOKENS_PER_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    LIMIT: tl.constexpr,
    SCATTER: tl.constexpr,
):
    """A program copies `TOKENS` tokens of one head of K or V in one layer; `WIDTH` words a token."""
    row = tl.program_id(1)
    head = row % num_heads
    plane = row // num_heads  # layer * kv_factor + K or V
    layer = first_layer + plane // kv_factor
    pool_row = layer.to(tl.int64) * layer_stride + ((plane % kv_factor) * pool_heads + first_head + head) * head_stride
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    position = first_token + tokens
    inside = tokens < num_tokens
    block = tl.load(block_table + position // TOKENS_PER_BLOCK, mask=inside, other=0).to(tl.int64)
    token_at = pool_row + block * block_stride + (position % TOKENS_PER_BLOCK) * WIDTH
    words = tl.arange(0, PADDED)
    mask = inside[:, None] & (words < WIDTH)[None, :]
    in_pool = pool + token_at[:, None] + words[None, :]
    in_pack = packed + (row.to(tl.int64) * num_tokens + tokens)[:, None] * WIDTH + words[None, :]
    values = tl.load(in_pack if SCATTER else in_pool, mask=mask)
    target = in_pool if SCATTER else in_pack
    if values.dtype != target.dtype.element_ty:
        values = values.to(tl.float32)
        if LIMIT > 0:
            values = tl.clamp(values, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        values = values.to(target.dtype.element_ty)
    tl.store(target, values, mask=mask)


def pack_rows(rows: Tensor, row_ids: Tensor, packed: Tensor) -> None:
    """`packed[i] = rows[row_ids[i]]`, on the current stream. Rows may have gaps between them."""
    _launch_rows(rows, packed, row_ids, rows.stride(0), scatter=False)


def unpack_rows(packed: Tensor, row_ids: Tensor, rows: Tensor) -> None:
    """`rows[row_ids[i]] = packed[i]`, on the current stream."""
    _launch_rows(packed, rows, row_ids, rows.stride(0), scatter=True)


def _launch_rows(source: Tensor, target: Tensor, row_ids: Tensor, pool_stride: int, scatter: bool) -> None:
    if row_ids.numel() == 0:
        return
    row_words = source.shape[1]
    tile = min(TILE_BYTES // source.element_size(), triton.next_power_of_2(row_words))
    grid = (row_ids.numel(), triton.cdiv(row_words, tile))
    _copy_rows[grid](source, target, row_ids, row_words, pool_stride, SCATTER=scatter, TILE=tile, num_warps=8)


def copy_slice(pool: Tensor, block_table: Tensor, part: KvSlice, packed: Tensor, scatter: bool) -> None:
    """Pack `part` of `pool`, or with `scatter` unpack it, on the current stream; shapes as in `pd_kernels.kv_pack`."""
    if packed.numel() == 0:
        return
    limit = 0.0
    source, target = (packed, pool) if scatter else (pool, packed)
    if source.dtype == target.dtype:
        pool, packed = _as_words(pool, packed)
    elif torch.finfo(source.dtype).max > torch.finfo(target.dtype).max:
        limit = torch.finfo(target.dtype).max
    _, _, kv_factor, pool_heads, tokens_per_block, width = pool.shape
    padded = triton.next_power_of_2(width)
    tokens = max(1, TILE_BYTES // (padded * max(pool.element_size(), packed.element_size())))
    grid = (triton.cdiv(part.num_tokens, tokens), part.num_layers * kv_factor * part.num_heads)
    _copy_slice[grid](
        pool,
        packed,
        block_table,
        part.num_tokens,
        part.token,
        part.num_heads,
        part.head,
        part.layer,
        pool.stride(0),
        pool.stride(1),
        pool.stride(3),
        kv_factor,
        pool_heads,
        TOKENS_PER_BLOCK=tokens_per_block,
        WIDTH=width,
        PADDED=padded,
        TOKENS=tokens,
        LIMIT=limit,
        SCATTER=scatter,
        num_warps=8,
    )


def _as_words(pool: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the widest integers that divide a token's values and the addresses: copied as they are, and quickly."""
    row_bytes = pool.shape[-1] * pool.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(n % dtype.itemsize == 0 for n in (row_bytes, pool.data_ptr(), packed.data_ptr())):
            return pool.view(dtype), packed.view(dtype)
    return pool.view(torch.uint8), packed.view(torch.uint8)

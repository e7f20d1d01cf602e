"""Gather KV blocks into one contiguous buffer, and scatter them back.

Blocks are opaque bytes here: a pool is `[num_blocks, ...]`, contiguous, and a packed buffer holds the named blocks one
after another. CUDA pools take one Triton launch on the current stream, everything else the torch reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_kernels.kv_pack import reference


def pack_blocks(pool: Tensor, block_ids: Tensor, packed: Tensor) -> None:
    """Copy the blocks `block_ids` of `pool` into `packed`, in that order.

    Args:
        pool: `[num_blocks, ...]`, contiguous, any dtype.
        block_ids: `[n]`, int64, on the pool's device; the caller has checked their range.
        packed: uint8 `[n * block_bytes]`, contiguous, on the pool's device, written whole.
    """
    rows, packed_rows = _rows(pool, block_ids, packed)
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        triton_kernel.pack_rows(rows, block_ids, packed_rows)
    else:
        reference.pack_rows(rows, block_ids, packed_rows)


def unpack_blocks(packed: Tensor, block_ids: Tensor, pool: Tensor) -> None:
    """Copy `packed` into the blocks `block_ids` of `pool`; no other block is touched.

    Shapes are those of `pack_blocks`. `block_ids` must name each block once.
    """
    rows, packed_rows = _rows(pool, block_ids, packed)
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        triton_kernel.unpack_rows(packed_rows, block_ids, rows)
    else:
        reference.unpack_rows(packed_rows, block_ids, rows)


def _rows(pool: Tensor, block_ids: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Pool and packed buffer as rows of the widest integer that divides a block and its address."""
    block_bytes = pool[0].numel() * pool.element_size()
    assert packed.numel() == block_ids.numel() * block_bytes, "the packed buffer holds the named blocks exactly"
    dtype = _word(block_bytes, pool.data_ptr(), packed.data_ptr())
    return pool.view(pool.shape[0], -1).view(torch.uint8).view(dtype), packed.view(-1, block_bytes).view(dtype)


def _word(*sizes: int) -> torch.dtype:
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(size % dtype.itemsize == 0 for size in sizes):
            return dtype
    return torch.uint8


__all__ = ["pack_blocks", "unpack_blocks"]

"""Gather parts of a paged KV pool into one contiguous buffer, scatter them back, or read them out of another pool.

Two shapes of part. *Blocks*: the named blocks, or some layers of each, byte for byte; what is packed is contiguous in
the pool, one piece a block. *Slice*: some layers, heads and tokens of one sequence, found through its block table, with
a conversion of type that saturates (never makes an infinity; NaN stays NaN). CUDA pools take one Triton launch on the
current stream, everything else the torch reference.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pd_kernels.kv_pack import reference
from pd_kernels.kv_pack.margins import MARGIN_BYTES, margins, pool_with_margins


class KvSlice(NamedTuple):
    """What to take of a pool `[num_blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`.

    `layer` and `head` are indices into the pool; `token` is a position in the sequence.
    """

    layer: int
    num_layers: int
    head: int
    num_heads: int
    token: int
    num_tokens: int


def pack_blocks(pool: Tensor, block_ids: Tensor, packed: Tensor, layer: int = 0, num_layers: int | None = None) -> None:
    """Copy `num_layers` layers (all, if left out) of the blocks `block_ids` into `packed`, in that order.

    Args:
        pool: `[num_blocks, layers, ...]`, contiguous, any dtype.
        block_ids: `[n]`, int64, on the pool's device; the caller has checked their range.
        packed: uint8 `[n * num_layers * layer_bytes]`, contiguous, on the pool's device, written whole.
    """
    _copy_blocks(pool, block_ids, packed, layer, num_layers, scatter=False)


def unpack_blocks(
    packed: Tensor, block_ids: Tensor, pool: Tensor, layer: int = 0, num_layers: int | None = None
) -> None:
    """Copy `packed` into those layers of the blocks `block_ids`; nothing else of `pool` is touched.

    Shapes are those of `pack_blocks`. `block_ids` must name each block once.
    """
    _copy_blocks(pool, block_ids, packed, layer, num_layers, scatter=True)


class ForeignPool(NamedTuple):
    """A pool that is no tensor of this process: blocks of `num_layers` layers at `address`, readable from the device of
    the pool that it is copied to. Blocks and layers are laid out as in that pool."""

    address: int
    num_blocks: int
    num_layers: int


class BlockReader(Protocol):
    """Copies blocks of another pool, or some layers of each, into its own."""

    def read(self, source_ids: Tensor, source_layer: int, row_ids: Tensor, layer: int, num_layers: int) -> None:
        """Copy `num_layers` layers of block `source_ids[i]` of the source, from `source_layer` on, to those of block
        `row_ids[i]` of the pool from `layer` on.

        Args:
            source_ids: `[n]`, int64, on the pool's device, as are `row_ids`; the caller has checked the range of both.
                `row_ids` names each block once.
        """


def block_reader(source: ForeignPool, pool: Tensor) -> BlockReader:
    """What reads `source` into `pool` (`[num_blocks, layers, ...]`, contiguous, any dtype). Made once for many reads;
    on a GPU the first one compiles."""
    layer_bytes = pool.stride(0) * pool.element_size() // pool.shape[1]
    word = _word(math.gcd(layer_bytes, pool.data_ptr(), source.address))
    layer_words = layer_bytes // word.itemsize
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        return triton_kernel.LayerReader(source.address, source.num_layers, pool, layer_words, word)
    rows = reference.foreign_rows(source.address, source.num_blocks, source.num_layers * layer_words, word)
    return reference.LayerReader(rows, pool.view(pool.shape[0], -1).view(word), layer_words)


def read_margins(address: int, nbytes: int, device: torch.device) -> Tensor:
    """What stands in the margins of a pool of `nbytes` at `address`, which is readable from `device`: uint8
    `[2, MARGIN_BYTES]` on that device, read as a `BlockReader` reads."""
    found, row = torch.zeros(2, 1, MARGIN_BYTES, dtype=torch.uint8, device=device), torch.zeros(1, dtype=torch.int64)
    row = row.to(device)
    for index, at in enumerate((address - MARGIN_BYTES, address + nbytes)):
        block_reader(ForeignPool(at, 1, 1), found[index : index + 1]).read(row, 0, row, 0, 1)
    return found.view(2, MARGIN_BYTES)


def pack_slice(pool: Tensor, block_table: Tensor, part: KvSlice, packed: Tensor) -> None:
    """Copy `part` of the sequence whose blocks `block_table` names into `packed`.

    Args:
        pool: `[num_blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`, contiguous, of floats.
        block_table: `[n]`, int64, on the pool's device: token `t` is in block `block_table[t // tokens_per_block]`.
        packed: `[num_layers, kv_factor, num_heads, num_tokens, head_dim]`, contiguous, of floats, written whole.
    """
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        triton_kernel.copy_slice(pool, block_table, part, packed, scatter=False)
    else:
        reference.pack_slice(pool, block_table, part, packed)


def unpack_slice(packed: Tensor, block_table: Tensor, part: KvSlice, pool: Tensor) -> None:
    """Copy `packed` into `part` of the sequence's blocks; nothing else of `pool` is touched.

    Shapes are those of `pack_slice`. `block_table` must name each block once.
    """
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        triton_kernel.copy_slice(pool, block_table, part, packed, scatter=True)
    else:
        reference.unpack_slice(packed, block_table, part, pool)


def _copy_blocks(
    pool: Tensor, block_ids: Tensor, packed: Tensor, layer: int, num_layers: int | None, scatter: bool
) -> None:
    all_layers = pool.shape[1]
    layers = all_layers if num_layers is None else num_layers
    layer_bytes = pool.stride(0) * pool.element_size() // all_layers
    assert packed.numel() == block_ids.numel() * layers * layer_bytes, "the packed buffer holds the pieces exactly"
    word = _word(math.gcd(layer_bytes, pool.data_ptr(), packed.data_ptr()))
    layer_words = layer_bytes // word.itemsize
    first_word, row_words = layer * layer_words, layers * layer_words
    if pool.is_cuda:
        from pd_kernels.kv_pack import triton_kernel

        triton_kernel.copy_rows(pool, packed, block_ids, first_word, row_words, word, scatter)
    else:
        rows = pool.view(pool.shape[0], -1).view(word)[:, first_word : first_word + row_words]
        copy = reference.unpack_rows if scatter else reference.pack_rows
        copy(rows, block_ids, packed.view(word).view(-1, row_words))


def _word(divisor: int) -> torch.dtype:
    """The widest integer whose size divides `divisor`."""
    for dtype in (torch.int64, torch.int32, torch.int16):
        if divisor % dtype.itemsize == 0:
            return dtype
    return torch.uint8


__all__ = [
    "MARGIN_BYTES",
    "BlockReader",
    "ForeignPool",
    "KvSlice",
    "block_reader",
    "margins",
    "pack_blocks",
    "pack_slice",
    "pool_with_margins",
    "read_margins",
    "unpack_blocks",
    "unpack_slice",
]

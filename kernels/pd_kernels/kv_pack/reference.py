"""Pack and unpack in torch: the oracle of the kernels, and what CPU pools use."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pd_kernels.kv_pack import KvSlice


def pack_rows(rows: Tensor, row_ids: Tensor, packed: Tensor) -> None:
    """`packed[i] = rows[row_ids[i]]`. `rows` is `[num_rows, row_words]`, `packed` `[n, row_words]`."""
    torch.index_select(rows, 0, row_ids, out=packed)


def unpack_rows(rows: Tensor, row_ids: Tensor, packed: Tensor) -> None:
    """`rows[row_ids[i]] = packed[i]`."""
    rows.index_copy_(0, row_ids, packed)


class LayerReader:
    """Copies layers of rows of `source` to rows of `rows`, both `[num_rows, layers * layer_words]`."""

    def __init__(self, source: Tensor, rows: Tensor, layer_words: int) -> None:
        self._source = source
        self._rows = rows
        self._layer_words = layer_words

    def read(self, source_ids: Tensor, source_layer: int, row_ids: Tensor, layer: int, num_layers: int) -> None:
        """`rows[row_ids[i]] = source[source_ids[i]]`, in `num_layers` layers from those named on."""
        words, length = self._layer_words, num_layers * self._layer_words
        theirs = self._source[:, source_layer * words :][:, :length]
        self._rows[:, layer * words :][:, :length].index_copy_(0, row_ids, theirs.index_select(0, source_ids))


def foreign_rows(address: int, num_rows: int, row_words: int, word: torch.dtype) -> Tensor:
    """Memory of this process that is no tensor's, as `[num_rows, row_words]`."""
    memory = (ctypes.c_char * (num_rows * row_words * word.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=word).view(num_rows, row_words)


def pack_slice(pool: Tensor, block_table: Tensor, part: KvSlice, packed: Tensor) -> None:
    """`packed[l, k, h, t] = pool[block, layer + l, k, head + h, slot]` for the place of token `token + t`."""
    heads, blocks, slots = _places(pool, block_table, part)
    values = heads[blocks, :, :, :, slots].permute(1, 2, 3, 0, 4)
    bits(packed).copy_(bits(convert(values.contiguous().view(pool.dtype), packed.dtype)))


def unpack_slice(packed: Tensor, block_table: Tensor, part: KvSlice, pool: Tensor) -> None:
    """The reverse of `pack_slice`."""
    heads, blocks, slots = _places(pool, block_table, part)
    heads[blocks, :, :, :, slots] = bits(convert(packed, pool.dtype)).permute(3, 0, 1, 2, 4)


def convert(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as `dtype`: rounded to the nearest, the largest finite value where they are beyond it."""
    if values.dtype == dtype:
        return values
    limit = torch.finfo(dtype).max
    if torch.finfo(values.dtype).max > limit:
        values = values.float().clamp(-limit, limit)
    return values.to(dtype)


def bits(values: Tensor) -> Tensor:
    """`values` as integers of their size: copied as they are, whatever they mean, also types with few operations."""
    return values.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def _places(pool: Tensor, block_table: Tensor, part: KvSlice) -> tuple[Tensor, Tensor, Tensor]:
    """The slice's layers and heads of every block, as integers, and where each of its tokens is: block and slot."""
    tokens = torch.arange(part.token, part.token + part.num_tokens, device=pool.device)
    tokens_per_block = pool.shape[4]
    layers = slice(part.layer, part.layer + part.num_layers)
    heads = bits(pool)[:, layers, :, part.head : part.head + part.num_heads]
    return heads, block_table[tokens // tokens_per_block], tokens % tokens_per_block

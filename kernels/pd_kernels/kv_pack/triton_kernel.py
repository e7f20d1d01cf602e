"""Pack and unpack as one launch each: a program copies one tile of one row.

Both are bound by memory: every word is read once and written once. Offsets are 64-bit, for a pool is often larger than
2^31 words.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_BYTES = 16384


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _copy_rows(source, target, row_ids, row_words, SCATTER: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    packed_row = tl.program_id(0).to(tl.int64)
    pool_row = tl.load(row_ids + packed_row).to(tl.int64)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = words < row_words
    source_row = packed_row if SCATTER else pool_row
    target_row = pool_row if SCATTER else packed_row
    values = tl.load(source + source_row * row_words + words, mask=inside)
    tl.store(target + target_row * row_words + words, values, mask=inside)


def pack_rows(rows: Tensor, row_ids: Tensor, packed: Tensor) -> None:
    """`packed[i] = rows[row_ids[i]]`, on the current stream."""
    _launch(rows, packed, row_ids, scatter=False)


def unpack_rows(packed: Tensor, row_ids: Tensor, rows: Tensor) -> None:
    """`rows[row_ids[i]] = packed[i]`, on the current stream."""
    _launch(packed, rows, row_ids, scatter=True)


def _launch(source: Tensor, target: Tensor, row_ids: Tensor, scatter: bool) -> None:
    if row_ids.numel() == 0:
        return
    row_words = source.shape[1]
    tile = min(TILE_BYTES // source.element_size(), triton.next_power_of_2(row_words))
    grid = (row_ids.numel(), triton.cdiv(row_words, tile))
    _copy_rows[grid](source, target, row_ids, row_words, SCATTER=scatter, TILE=tile, num_warps=8)

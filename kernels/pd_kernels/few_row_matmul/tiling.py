"""Which kernel and which tiles a product of a few rows gets, by its shape alone.

The limits are where torch 2.11's cuBLAS stopped being slower on one H200, over the matrices of four models and 1 to 64
rows (docs/log.md).
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 32
# Tiles of the kernel for several rows; the number of inputs must be a multiple of a tile's.
_TILE_OUTPUTS, _TILE_INPUTS = 64, 128
# Programs that have a processor to themselves must keep so many of the processors busy; if there are more, then so many
# that processors which get one less don't idle for long.
_MIN_OCCUPANCY, _MIN_ROUNDS = 0.7, 1.6
# A shared sum costs a round trip through memory: fewer tiles of inputs than this are not worth it.
_MIN_SHARED_TILES = 12


@dataclass(frozen=True, slots=True)
class Tiling:
    """Programs compute tiles of `block_n` outputs, `block_k` inputs at a time, `num_splits` programs sharing a sum.

    `block_m` is the rows of a tile; with 1, products are elementwise, without tensor cores.
    """

    block_m: int
    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int


def choose(num_rows: int, num_outputs: int, num_inputs: int, num_processors: int) -> Tiling | None:
    """How to multiply; None where torch's own product is as fast, or the rows are not on 16 bytes."""
    if num_rows == 1 and num_inputs % 8 == 0:
        return Tiling(1, 4, 2048, 1, 4, 1) if num_inputs % 2048 == 0 else Tiling(1, 16, 256, 1, 4, 4)
    if not 1 < num_rows <= MAX_ROWS or num_inputs % _TILE_INPUTS:
        return None
    block_m = 16 if num_rows <= 16 else 32
    num_tiles = -(-num_outputs // _TILE_OUTPUTS)
    if num_tiles >= _MIN_ROUNDS * num_processors:
        return Tiling(block_m, _TILE_OUTPUTS, _TILE_INPUTS, 1, 4, 4)
    num_splits = max(1, min(num_processors // num_tiles, num_inputs // _TILE_INPUTS // _MIN_SHARED_TILES))
    if not _MIN_OCCUPANCY * num_processors <= num_tiles * num_splits <= num_processors:
        return None
    # With a processor to itself, a program has room for more loads under way.
    return Tiling(block_m, _TILE_OUTPUTS, _TILE_INPUTS, num_splits, 4, 6)

"""Pack and unpack as one launch each: a program copies one tile of one contiguous piece.

All are bound by memory: every word is read once and written once. Offsets are 64-bit, for a pool is often larger than
2^31 words. A message of 20 MiB crosses NVLink in 54 us, so a launch must not take the host that long: `_Launcher` keeps
what Triton would look up each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pd_kernels.kv_pack import KvSlice

TILE_BYTES = 16384
NUM_WARPS = 8

READ_TILE_BYTES = 32768
READ_PROGRAMS = 32
"""Reading over NVLink at 370 of the 372 GB/s that any number reaches, while the other SMs decode."""


# Any part of a block table may be `row_ids`, aligned or not.
@triton.jit(do_not_specialize_on_alignment=["row_ids"])  # type: ignore[untyped-decorator,unused-ignore]
def _copy_rows(  # type: ignore[no-untyped-def]
    pool,
    packed,
    row_ids,
    first_word,
    row_words,
    pool_stride,
    WORD: tl.constexpr,
    SCATTER: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program copies `TILE` of the words from `first_word` on of `pool`'s row `row_ids[i]`; they are `packed`'s row
    `i`."""
    packed_row = tl.program_id(0).to(tl.int64)
    pool_row = tl.load(row_ids + packed_row).to(tl.int64)
    words = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = words < row_words
    in_pool = pool.to(tl.pointer_type(WORD), bitcast=True) + pool_row * pool_stride + first_word + words
    in_pack = packed.to(tl.pointer_type(WORD), bitcast=True) + packed_row * row_words + words
    if SCATTER:
        tl.store(in_pool, tl.load(in_pack, mask=inside), mask=inside)
    else:
        tl.store(in_pack, tl.load(in_pool, mask=inside), mask=inside)


@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["num_rows", "source_layer", "layer", "num_layers"],
    do_not_specialize_on_alignment=["source_ids", "row_ids"],
)
def _read_layers(  # type: ignore[no-untyped-def]
    pool,
    source,
    source_ids,
    row_ids,
    num_rows,
    source_layer,
    layer,
    num_layers,
    SOURCE_LAYERS: tl.constexpr,
    POOL_LAYERS: tl.constexpr,
    LAYER_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The programs take turns at tiles: `TILE` words of the layers of one row."""
    theirs = source.to(tl.pointer_type(WORD), bitcast=True) + source_layer * LAYER_WORDS
    ours = pool.to(tl.pointer_type(WORD), bitcast=True) + layer * LAYER_WORDS
    row_words = num_layers * LAYER_WORDS
    row_tiles = tl.cdiv(row_words, TILE)
    for tile in range(tl.program_id(0), num_rows * row_tiles, PROGRAMS):
        row = tile // row_tiles
        words = (tile % row_tiles) * TILE + tl.arange(0, TILE)
        inside = words < row_words
        source_row = tl.load(source_ids + row).to(tl.int64)
        pool_row = tl.load(row_ids + row).to(tl.int64)
        values = tl.load(theirs + source_row * (SOURCE_LAYERS * LAYER_WORDS) + words, mask=inside)
        tl.store(ours + pool_row * (POOL_LAYERS * LAYER_WORDS) + words, values, mask=inside)


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


class _Launcher:
    """Launches `kernel` on the current stream, of whose arguments the last `num_constants` are constexpr.

    Triton specialises a kernel by its arguments' types, the alignment of pointers, and which integers are 1, or
    multiples of 16. Its own look-up of that takes 10 us, this one 5.
    """

    def __init__(self, kernel: Any, num_constants: int) -> None:
        self._kernel = kernel
        self._num_constants = num_constants
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def launch(self, grid: tuple[int, int, int], *arguments: Any) -> None:
        """The first argument is a tensor of the current device."""
        constants = arguments[-self._num_constants :]
        key = (arguments[0].device, constants, *map(_kind, arguments[: -self._num_constants]))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*arguments)
        elif (compiled := self._kernel[grid](*arguments, num_warps=NUM_WARPS)) is not None:  # None: the interpreter
            self._compiled[key] = compiled


def _kind(argument: Tensor | int) -> object:
    """Equal only for arguments that Triton compiles the same code for."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return argument if argument in (0, 1) else (argument % 16 == 0, argument.bit_length() > 31)


def copy_rows(
    pool: Tensor, packed: Tensor, row_ids: Tensor, first_word: int, row_words: int, word: torch.dtype, scatter: bool
) -> None:
    """Copy a part of the rows `row_ids` of `pool` into `packed`, or with `scatter` back, on the current stream.

    Args:
        pool: contiguous; its first dimension counts the rows.
        packed: contiguous, of as many bytes as the parts have together.
        row_ids: int64 `[n]`.
        first_word: where in a row its part begins, in units of `word`.
        row_words: how long the part is.
        word: an integer type whose size divides place and length of a part, in the pool as in `packed`.
    """
    if row_ids.numel() == 0:
        return
    stride = pool.stride(0) * pool.element_size() // word.itemsize
    tile = min(TILE_BYTES // word.itemsize, triton.next_power_of_2(row_words))
    grid = (row_ids.numel(), triton.cdiv(row_words, tile), 1)
    _rows.launch(grid, pool, packed, row_ids, first_word, row_words, stride, _WORDS[word], scatter, tile)


class LayerReader:
    """Copies layers of rows at the address `source` to rows of `pool`, one launch each, on the current stream.

    Everything that stays the same is looked up at the first call, which compiles; a later one takes 10 us less.

    Args:
        source: rows of `source_layers` layers, laid out as those of `pool`.
        pool: `[num_rows, layers, ...]`, contiguous, on the current device.
        layer_words: a layer's length in units of `word`, whose size divides it, `source` and the pool's address.
    """

    def __init__(self, source: int, source_layers: int, pool: Tensor, layer_words: int, word: torch.dtype) -> None:
        layers = pool.shape[1]
        row_words = layers * layer_words
        tile = min(READ_TILE_BYTES // word.itemsize, triton.next_power_of_2(row_words))
        self._pool = pool
        self._pool_address = pool.data_ptr()
        self._source = source
        self._constants = (source_layers, layers, layer_words, _WORDS[word], READ_PROGRAMS, tile)
        self._run: Any = None

    def read(self, source_ids: Tensor, source_layer: int, row_ids: Tensor, layer: int, num_layers: int) -> None:
        """Rows `source_ids` of the source become rows `row_ids` of the pool (both int64 `[n]`), in `num_layers` layers
        from `source_layer` there and `layer` here. Reading no rows launches as well."""
        rest = source_ids.numel(), source_layer, layer, num_layers, *self._constants
        if self._run is not None:  # which asks the driver about each tensor, and takes an address as it is
            self._run(self._pool_address, self._source, source_ids.data_ptr(), row_ids.data_ptr(), *rest)
            return
        grid = (READ_PROGRAMS, 1, 1)
        compiled = _read_layers[grid](self._pool, self._source, source_ids, row_ids, *rest, num_warps=NUM_WARPS)
        self._run = compiled and compiled[grid]  # the interpreter compiles nothing


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
    grid = (triton.cdiv(part.num_tokens, tokens), part.num_layers * kv_factor * part.num_heads, 1)
    _slices.launch(
        grid,
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
        tokens_per_block,
        width,
        padded,
        tokens,
        limit,
        scatter,
    )


_WORDS = {torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.uint8: tl.uint8}
_rows = _Launcher(_copy_rows, num_constants=3)
_slices = _Launcher(_copy_slice, num_constants=6)


def _as_words(pool: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """Both as the widest integers that divide a token's values and the addresses: copied as they are, and quickly."""
    row_bytes = pool.shape[-1] * pool.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(n % dtype.itemsize == 0 for n in (row_bytes, pool.data_ptr(), packed.data_ptr())):
            return pool.view(dtype), packed.view(dtype)
    return pool.view(torch.uint8), packed.view(torch.uint8)

"""Attention of prefills in Triton: any number of sequences in one launch, over keys and values that lie dense in rows.

A program owns a tile: a few neighbouring tokens of one sequence, with all query heads that share a key head, so that
they share its loads. Which tokens, and where their keys are, stands in a table that the host makes once a step, longest
tile first, so that the last programs to start are short ones. Keys come through tensor descriptors (the copy engine of
a Hopper GPU) from the step's own `qkv`, or from the rows that `gather` lays out of the paged cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pd_kernels.paged_attention.layout import GATHER_TOKENS, KvRows, Partial
from pd_kernels.paged_attention.online_softmax import LOG2_E, accumulate, capped, load_slopes, score_factors, start
from pd_kernels.paged_attention.spec import AttentionSpec

# Small enough that a Hopper processor holds two programs: one weighs while the other multiplies.
_TILE_ROWS, _TILE_KEYS = 64, 64
_TILE_BYTES = 16384
_NUM_WARPS, _NUM_STAGES = 4, 3
_MERGED_NUMEL = 1024  # of a program that merges
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load_weights(own_ptrs, other_ptrs, mask):  # type: ignore[no-untyped-def]
    """Of two partial results with log-sum-exps at these places: their weights, and the maximum that those refer to."""
    own = tl.load(own_ptrs, mask=mask, other=0.0) * _LOG2_E
    other = tl.load(other_ptrs, mask=mask, other=0.0) * _LOG2_E
    highest = tl.maximum(own, other)
    return tl.exp2(own - highest), tl.exp2(other - highest), highest


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _attend_tiles(  # type: ignore[no-untyped-def]
    first, last, q, kv, kv_row, key_column, value_column, end, num_seen, tokens, slopes, scale_log2,
    highest, total, acc, MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take in the tiles of keys that start at `first` or later and before `last`, whole, or `MASKED` row by row."""
    for tile in range(first, last, BLOCK_N):
        at = tile + tl.arange(0, BLOCK_N)
        scores = capped(tl.dot(q, kv.load([kv_row + tile, key_column]).T, input_precision="ieee"), CAP)
        if slopes is not None:
            scores += slopes[:, None] * (at[None, :] - (num_seen - 1 + tokens)[:, None])
        if MASKED:
            visible = (at < end)[None, :] & (at[None, :] < (num_seen + tokens)[:, None])
            if WINDOW:
                visible &= at[None, :] >= (num_seen - WINDOW + tokens)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        values = kv.load([kv_row + tile, value_column])
        if MASKED:
            # Rows past the end are another sequence's, and a weight of zero makes no nan of theirs harmless.
            values = tl.where((at < end)[:, None], values, 0.0)
        highest, total, acc = accumulate(scores, scale_log2, values, highest, total, acc)
    return highest, total, acc


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _attend_keys(  # type: ignore[no-untyped-def]
    first_key, end, q, kv, kv_row, key_column, value_column, num_seen, num_tokens, tokens, slopes, scale_log2,
    highest, total, acc, WINDOW: tl.constexpr, CAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take in all that a tile's tokens see: where windows begin row by row, then whole, then what is new row by row."""
    if WINDOW:
        first_key = tl.maximum(num_seen - WINDOW, 0)
        # Before it are keys that the last token does not see.
        last_window = num_seen + num_tokens - 1 - WINDOW
        whole = first_key + tl.cdiv(tl.maximum(last_window - first_key, 0), BLOCK_N) * BLOCK_N
        highest, total, acc = _attend_tiles(
            first_key, whole, q, kv, kv_row, key_column, value_column, end, num_seen, tokens, slopes, scale_log2,
            highest, total, acc, True, WINDOW, CAP, BLOCK_N,
        )  # fmt: skip
        unmasked_end = first_key + (num_seen - first_key) // BLOCK_N * BLOCK_N
        first_key = whole
    else:
        unmasked_end = num_seen // BLOCK_N * BLOCK_N
    highest, total, acc = _attend_tiles(
        first_key, unmasked_end, q, kv, kv_row, key_column, value_column, end, num_seen, tokens, slopes, scale_log2,
        highest, total, acc, False, WINDOW, CAP, BLOCK_N,
    )  # fmt: skip
    return _attend_tiles(
        tl.maximum(unmasked_end, first_key), end, q, kv, kv_row, key_column, value_column, end, num_seen, tokens,
        slopes, scale_log2, highest, total, acc, True, WINDOW, CAP, BLOCK_N,
    )  # fmt: skip


# Not specialized: what changes from step to step, because each specialization is compiled while requests wait.
@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["key_column", "first_key", "first_token", "own_stride", "other_stride"],
    do_not_specialize_on_alignment=["sinks_ptr"],
)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, kv, out_ptr, tiles_ptr, own_ptr, own_lse_ptr, other_ptr, other_lse_ptr, sinks_ptr, slopes_ptr,
    qkv_stride, out_stride, key_column, first_key, first_token, own_stride, other_stride, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PITCH: tl.constexpr, SEEDED: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    kv_head = tl.program_id(1)
    token = tl.load(tile_ptr).to(tl.int64)
    num_tokens = tl.load(tile_ptr + 1)
    # Keys that the tile's first token sees. The others see one more each, unless seeds stand for those.
    num_seen = tl.load(tile_ptr + 2)
    kv_row = tl.load(tile_ptr + 3)
    rows = tl.arange(0, BLOCK_M)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    columns = tl.arange(0, BLOCK_D)
    in_rows = tokens < num_tokens
    in_tile = in_rows[:, None] & (columns < HEAD_DIM)[None, :]
    head_offsets = (heads * HEAD_DIM)[:, None] + columns[None, :]
    q_offsets = (token + tokens)[:, None] * qkv_stride + head_offsets
    q = tl.load(qkv_ptr + q_offsets, mask=in_tile, other=0.0)

    if SEEDED:
        end = num_seen
        seed_rows = token - first_token + tokens
        own_weight, other_weight, highest = _load_weights(
            own_lse_ptr + heads * own_stride + seed_rows, other_lse_ptr + heads * other_stride + seed_rows, in_rows
        )
        total = own_weight + other_weight
        seed_offsets = seed_rows[:, None] * (tl.num_programs(1) * GROUP * HEAD_DIM) + head_offsets
        own = tl.load(own_ptr + seed_offsets, mask=in_tile, other=0.0).to(tl.float32)
        other = tl.load(other_ptr + seed_offsets, mask=in_tile, other=0.0).to(tl.float32)
        acc = own * own_weight[:, None] + other * other_weight[:, None]
    else:
        end = num_seen + num_tokens - 1
        highest, total, acc = start(sinks_ptr, heads, in_rows, True, WINDOW, BLOCK_M, BLOCK_D)
    slopes = None
    if slopes_ptr is not None:
        slopes = load_slopes(slopes_ptr, heads, in_rows, scale_log2)

    key_column += kv_head * PITCH
    value_column = key_column + tl.num_programs(1) * PITCH
    highest, total, acc = _attend_keys(
        first_key, end, q, kv, kv_row, key_column, value_column, num_seen, num_tokens, tokens, slopes, scale_log2,
        highest, total, acc, WINDOW, CAP, BLOCK_N,
    )  # fmt: skip

    out_offsets = (token + tokens)[:, None] * out_stride + head_offsets
    tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)


@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["table_stride"], do_not_specialize_on_alignment=["block_tables_ptr"]
)
def _gather_kernel(  # type: ignore[no-untyped-def]
    layer_ptr, rows_ptr, tiles_ptr, block_tables_ptr, block_stride, table_stride, row_stride,
    HEAD_DIM: tl.constexpr, PITCH: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.load(tile_ptr).to(tl.int64)
    first_key = tl.load(tile_ptr + 1)
    end = tl.load(tile_ptr + 2)
    if first_key >= end:
        return
    tokens = tl.arange(0, BLOCK_N)
    at = first_key + tokens
    in_seq = at < end
    columns = tl.arange(0, BLOCK_D)
    blocks = tl.load(block_tables_ptr + seq * table_stride + at // TOKENS_PER_BLOCK, mask=in_seq, other=0)
    slots = blocks.to(tl.int64) * block_stride + (head * TOKENS_PER_BLOCK + at % TOKENS_PER_BLOCK) * HEAD_DIM
    in_tile = in_seq[:, None] & (columns < HEAD_DIM)[None, :]
    tile = tl.load(layer_ptr + slots[:, None] + columns[None, :], mask=in_tile, other=0.0)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tokens
    tl.store(
        rows_ptr + rows[:, None] * row_stride + head * PITCH + columns[None, :],
        tile.to(rows_ptr.dtype.element_ty),
        mask=(columns < PITCH)[None, :],
    )


@triton.jit(do_not_specialize=["own_stride", "other_stride"])  # type: ignore[untyped-decorator,unused-ignore]
def _merge_kernel(  # type: ignore[no-untyped-def]
    own_ptr, own_lse_ptr, other_ptr, other_lse_ptr, out_ptr, own_stride, other_stride, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_D)
    in_tile = (heads < num_heads)[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = token * num_heads * HEAD_DIM + (heads * HEAD_DIM)[:, None] + columns[None, :]
    own_weight, other_weight, _ = _load_weights(
        own_lse_ptr + heads * own_stride + token, other_lse_ptr + heads * other_stride + token, heads < num_heads
    )
    own_share = own_weight / (own_weight + other_weight)
    own = tl.load(own_ptr + offsets, mask=in_tile, other=0.0).to(tl.float32)
    other = tl.load(other_ptr + offsets, mask=in_tile, other=0.0).to(tl.float32)
    out = own * own_share[:, None] + other * (1.0 - own_share)[:, None]
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=in_tile)


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one sequence: the first one's place in the step, how many keys it sees, and the row of key 0."""

    first_token: int
    num_tokens: int
    num_seen: int
    kv_row: int


def tile_tokens(group: int) -> int:
    """Tokens of a tile, at most."""
    return _block_m(group) // group


def tiles_of(spans: Iterable[Span], group: int, seeded: bool = False) -> list[tuple[int, int, int, int]]:
    """The table that `attend` takes: a span each, of as many tokens as fit into a tile.

    With `seeded`, all tokens of a span see as many keys as its first.
    """
    width = tile_tokens(group)
    tiles = [
        (span.first_token + at, min(width, span.num_tokens - at), span.num_seen + (0 if seeded else at), span.kv_row)
        for span in spans
        for at in range(0, span.num_tokens, width)
    ]
    return sorted(tiles, key=lambda tile: -tile[2])


def attend(qkv: Tensor, kv: KvRows, tiles: Tensor, spec: AttentionSpec, layer: int, out: Tensor) -> None:
    """Causal attention of the tokens in `tiles` (`tiles_of`, int32): fills their rows of `out`."""
    _launch(qkv, kv, tiles, spec, layer, out, None, (0, 0))


def attend_rest(
    qkv: Tensor, kv: KvRows, tiles: Tensor, spec: AttentionSpec, out: Tensor,
    seeds: tuple[Partial, Partial], first_token: int, first_key: int,
) -> None:  # fmt: skip
    """Attention of the tokens in `tiles`, made `seeded`, over the keys that `seeds` left out: fills their `out`.

    Args:
        spec: plain, as what made the seeds.
        seeds: attention of the tokens from `first_token` on over all keys but those from `first_key` to what the tiles
            see.
    """
    _launch(qkv, kv, tiles, spec, 0, out, seeds, (first_token, first_key))


def _launch(
    qkv: Tensor, kv: KvRows, tiles: Tensor, spec: AttentionSpec, layer: int, out: Tensor,
    seeds: tuple[Partial, Partial] | None, at: tuple[int, int],
) -> None:  # fmt: skip
    (own, other), (first_token, first_key) = seeds or (Partial(out, out), Partial(out, out)), at
    block_d = max(16, triton.next_power_of_2(spec.qk_dim))
    block_n = max(16, min(_TILE_KEYS, _TILE_BYTES // (block_d * qkv.element_size())))
    descriptor = TensorDescriptor(kv.rows, list(kv.rows.shape), list(kv.rows.stride()), [block_n, block_d])
    scale_log2, cap = score_factors(spec)
    _prefill_kernel[(tiles.shape[0], spec.num_kv_heads)](
        qkv, descriptor, out, tiles, own.out, own.lse, other.out, other.lse,
        None if spec.sinks is None else spec.sinks[layer], spec.alibi,
        qkv.stride(0), out.stride(0), kv.first_column, first_key, first_token, own.lse.stride(0), other.lse.stride(0),
        scale_log2,
        GROUP=spec.group, HEAD_DIM=spec.qk_dim, PITCH=kv.pitch, SEEDED=seeds is not None,
        WINDOW=spec.window or 0, CAP=cap, BLOCK_M=_block_m(spec.group), BLOCK_N=block_n, BLOCK_D=block_d,
        num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
    )  # fmt: skip


def merge(own: Partial, other: Partial, out: Tensor) -> None:
    """Attention over the keys of both; `out` is [n, num_heads * head_dim], dense."""
    num_tokens, num_heads, head_dim = own.out.shape
    block_d = triton.next_power_of_2(head_dim)
    block_heads = min(triton.next_power_of_2(num_heads), max(1, _MERGED_NUMEL // block_d))
    _merge_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        own.out, own.lse, other.out, other.lse, out, own.lse.stride(0), other.lse.stride(0), num_heads,
        HEAD_DIM=head_dim, BLOCK_HEADS=block_heads, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip


def gather(pool: Tensor, layer: int, block_tables: Tensor, tiles: Tensor, kv: KvRows) -> None:
    """Lay the cache out in `kv.rows`, GATHER_TOKENS for each of `tiles`, in its type; zeros past a sequence's end.

    Args:
        tiles: [n, 4] int32: sequence, its token to begin with, its length, and nothing.
    """
    layer_view = pool[:, layer]
    num_kv_heads, tokens_per_block, head_dim = pool.shape[3:]
    _gather_kernel[(tiles.shape[0], 2 * num_kv_heads)](
        layer_view, kv.rows, tiles, block_tables,
        layer_view.stride(0), block_tables.stride(0), kv.rows.stride(0),
        HEAD_DIM=head_dim, PITCH=kv.pitch, TOKENS_PER_BLOCK=tokens_per_block,
        BLOCK_N=GATHER_TOKENS, BLOCK_D=triton.next_power_of_2(kv.pitch), num_warps=4,
    )  # fmt: skip


def _block_m(group: int) -> int:
    return max(_TILE_ROWS, int(triton.next_power_of_2(group)))

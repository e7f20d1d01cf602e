"""Attention of decodes in Triton: the cache of one sequence is shared out to many programs (flash-decoding).

A decode has one row of queries, so a program per sequence and key head leaves most of a GPU idle and makes the longest
sequence the step's length. Here each of `num_splits` programs attends over its share of the sequence and writes a
normalized partial result with its log-sum-exp; a second kernel weighs the partial results together. A sequence that is
too short to be worth it stays with one program, which writes the result itself.

The launch depends on the number of sequences alone. Shares are computed on the device from the lengths, so a captured
CUDA graph stays right for any lengths, also 0: a padding row, which reads no cache and attends to nothing (zeros).
Source: "Flash-Decoding for long-context inference" (Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_kernels.paged_attention.online_softmax import accumulate, capped, load_slopes, score_factors, start
from pd_kernels.paged_attention.spec import AttentionSpec

_MIN_ROWS = 16  # of queries in a tile: the smallest that a tensor core takes
_MAX_SPLITS = 64
_PROGRAMS_PER_PROCESSOR = 16
# Once the batch alone fills the GPU, splits only keep one long sequence from running on after all others.
_BALANCING_SPLITS = 8
# How many tokens of a share are worth a program: the more programs there are anyway, the more. Up to so many shares.
_MIN_SHARE_TOKENS = ((64, 64), (128, 128), (256, 512))
_MIN_SHARE_TOKENS_BEYOND = 1024
# Most of a large batch's sequences are not shared out: then what the merging programs cost is that they are launched.
_MANY_SEQS, _MERGED_HEADS = 32, 4
# The interpreter runs programs one after another: as many splits as make it take all paths.
_INTERPRETER_PROCESSORS = 4
_TILE_BYTES = 16384
_NUM_WARPS, _NUM_STAGES = 2, 2
_FLOAT16_MAX = tl.constexpr(65504.0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _share_tokens(seq_len, num_splits, min_tiles, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens of a split: whole tiles, so that only the last split has a masked one, and `min_tiles` or more of them."""
    tiles = tl.cdiv(seq_len, BLOCK_N)
    return tl.cdiv(tiles, tl.maximum(1, tl.minimum(tiles // min_tiles, num_splits))) * BLOCK_N


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _seen_tokens(seq_len, WINDOW: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many tokens the newest one sees: those that splits share. `WINDOW` is 0 where there is none."""
    if WINDOW:
        seq_len = tl.minimum(seq_len, WINDOW)
    return seq_len


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load_queries(q_ptrs, mask, layer_ptr):  # type: ignore[no-untyped-def]
    """Queries, in the type that keys of `layer_ptr` are multiplied in."""
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    if layer_ptr.dtype.element_ty == tl.float8e4nv and q.dtype == tl.bfloat16:
        # Hopper turns float8 into float16 in one instruction, into bfloat16 in four. No bit of either is lost.
        q = tl.clamp(q.to(tl.float32), -_FLOAT16_MAX, _FLOAT16_MAX).to(tl.float16)
    return q


# Not specialized: what changes from step to step, because each specialization is compiled while requests wait.
@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["table_stride", "num_splits", "min_tiles"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "block_tables_ptr", "sinks_ptr"],
)
def _decode_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, layer_ptr, out_ptr, partial_ptr, lse_ptr, seq_lens_ptr, block_tables_ptr, sinks_ptr, slopes_ptr,
    qkv_stride, block_stride, kv_stride, table_stride, num_splits, min_tiles, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    num_seen = _seen_tokens(seq_len, WINDOW)
    share = _share_tokens(num_seen, num_splits, min_tiles, BLOCK_N)
    first = split * share
    if (split > 0) & (first >= num_seen):
        return
    end = tl.minimum(first + share, num_seen)
    if WINDOW:
        first += seq_len - num_seen
        end += seq_len - num_seen
    rows = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + rows
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    in_tile = (rows < GROUP)[:, None] & in_head[None, :]
    q_offsets = seq * qkv_stride + (heads * HEAD_DIM)[:, None] + columns[None, :]
    q = _load_queries(qkv_ptr + q_offsets, in_tile, layer_ptr)
    highest, total, acc = start(sinks_ptr, heads, rows < GROUP, split == 0, WINDOW, BLOCK_M, BLOCK_D)
    if slopes_ptr is not None:
        slopes = load_slopes(slopes_ptr, heads, rows < GROUP, scale_log2)
    for tile in range(first, end, BLOCK_N):
        at = tile + tl.arange(0, BLOCK_N)
        in_share = at < end
        blocks = tl.load(block_tables_ptr + seq * table_stride + at // TOKENS_PER_BLOCK, mask=in_share, other=0)
        kv_rows = blocks.to(tl.int64) * block_stride
        kv_rows += (kv_head * TOKENS_PER_BLOCK + at % TOKENS_PER_BLOCK) * HEAD_DIM
        keys = tl.load(
            layer_ptr + kv_rows[None, :] + columns[:, None], mask=in_share[None, :] & in_head[:, None], other=0.0
        )
        scores = capped(tl.dot(q, keys.to(q.dtype), input_precision="ieee"), CAP)
        if slopes_ptr is not None:
            scores += slopes[:, None] * (at - (seq_len - 1))[None, :]
        scores = tl.where(in_share[None, :], scores, float("-inf"))
        values = tl.load(
            layer_ptr + kv_stride + kv_rows[:, None] + columns[None, :],
            mask=in_share[:, None] & in_head[None, :],
            other=0.0,
        )
        highest, total, acc = accumulate(scores, scale_log2, values.to(q.dtype), highest, total, acc)

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = seq * tl.num_programs(2) * GROUP + heads
    if share >= num_seen:
        out_offsets = out_rows[:, None] * HEAD_DIM + columns[None, :]
        tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=in_tile)
    else:
        partial_rows = out_rows * num_splits + split
        tl.store(partial_ptr + partial_rows[:, None] * HEAD_DIM + columns[None, :], acc, mask=in_tile)
        tl.store(lse_ptr + partial_rows, highest + tl.log2(total), mask=rows < GROUP)


@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["min_tiles"], do_not_specialize_on_alignment=["seq_lens_ptr"]
)
def _reduce_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, lse_ptr, out_ptr, seq_lens_ptr, min_tiles, num_heads,
    HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """A program merges `HEADS` heads of a sequence, or sees that there is nothing to merge."""
    seq = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    rows = seq * num_heads + heads
    num_seen = _seen_tokens(tl.load(seq_lens_ptr + seq).to(tl.int32), WINDOW)
    share = _share_tokens(num_seen, NUM_SPLITS, min_tiles, BLOCK_N)
    if share >= num_seen:
        return
    splits = tl.arange(0, NUM_SPLITS)
    columns = tl.arange(0, BLOCK_D)
    is_head, in_head = heads < num_heads, columns < HEAD_DIM
    partial_rows = rows[:, None] * NUM_SPLITS + splits[None, :]
    # Programs of empty shares wrote nothing.
    is_there = is_head[:, None] & (splits * share < num_seen)[None, :]
    lse = tl.load(lse_ptr + partial_rows, mask=is_there, other=float("-inf"))
    lse = tl.where(is_head[:, None], lse, 0.0)
    partial = tl.load(
        partial_ptr + partial_rows[:, :, None] * HEAD_DIM + columns[None, None, :],
        mask=is_there[:, :, None] & in_head[None, None, :],
        other=0.0,
    )
    weights = tl.exp2(lse - tl.max(lse, 1)[:, None])
    out = tl.sum(weights[:, :, None] * partial, 1) / tl.sum(weights, 1)[:, None]
    out_offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=is_head[:, None] & in_head[None, :])


def choose_num_splits(num_shares: int, num_processors: int) -> int:
    """Most programs per sequence and key head: the power of two that fills the GPU, and a few for balance.

    Args:
        num_shares: num_seqs * num_kv_heads.
    """
    fitting = max(1, _PROGRAMS_PER_PROCESSOR * num_processors // num_shares)
    return min(_MAX_SPLITS, max(_BALANCING_SPLITS, 1 << (fitting.bit_length() - 1)))


def choose_min_tiles(num_shares: int, block_n: int) -> int:
    """Tiles below which a share is not worth a program."""
    tokens = next((tokens for most, tokens in _MIN_SHARE_TOKENS if num_shares <= most), _MIN_SHARE_TOKENS_BEYOND)
    return max(1, tokens // block_n)


def choose_block_n(head_dim: int, element_bytes: int) -> int:
    """Tokens of a tile, a power of two: keys and values of a few tiles in flight fit in shared memory."""
    row_bytes = int(triton.next_power_of_2(head_dim)) * element_bytes
    return max(16, min(128, _TILE_BYTES // row_bytes))


class DecodeAttention:
    """The attention of a step's decodes: sequence i has one new token, row i of the step.

    Args:
        pool: see `pd_kernels.paged_attention.plan`.
        num_splits: most programs of a sequence and key head, a power of two; by default chosen for the pool's device.
        min_tiles: fewest tiles of a program that shares a sequence with others; by default chosen likewise.
    """

    def __init__(
        self, seq_lens: Tensor, block_tables: Tensor, pool: Tensor, num_seqs: int, spec: AttentionSpec,
        num_splits: int | None = None, min_tiles: int | None = None,
    ) -> None:  # fmt: skip
        self._seq_lens, self._block_tables, self._pool = seq_lens, block_tables, pool
        self._num_seqs, self._spec = num_seqs, spec
        self._block_n = choose_block_n(spec.qk_dim, pool.element_size())
        self._min_tiles = min_tiles or choose_min_tiles(num_seqs * spec.num_kv_heads, self._block_n)
        self._num_splits = num_splits or self._choose_num_splits()
        self._merged_heads = _MERGED_HEADS if num_seqs >= _MANY_SEQS else 1
        # Shared by the layers, which run one after another.
        shape = (num_seqs, spec.num_heads, self._num_splits, spec.v_dim)
        self._partial = torch.empty(shape, dtype=torch.float32, device=pool.device)
        self._lse = torch.empty(shape[:-1], dtype=torch.float32, device=pool.device)

    def _choose_num_splits(self) -> int:
        num_splits = choose_num_splits(self._num_seqs * self._spec.num_kv_heads, _num_processors(self._pool.device))
        if self._spec.window is None:
            return num_splits
        most_shares = -(-self._spec.window // (self._min_tiles * self._block_n))
        return min(num_splits, int(triton.next_power_of_2(most_shares)))

    def run(self, qkv: Tensor, layer: int, out: Tensor) -> None:
        """Fill the first rows of `out`, [num_tokens, num_heads * head_dim], dense."""
        spec, layer_view = self._spec, self._pool[:, layer]
        head_dim, window = spec.qk_dim, spec.window or 0
        block_d = max(16, triton.next_power_of_2(head_dim))
        scale_log2, cap = score_factors(spec)
        _decode_kernel[(self._num_splits, self._num_seqs, spec.num_kv_heads)](
            qkv, layer_view, out, self._partial, self._lse, self._seq_lens, self._block_tables,
            None if spec.sinks is None else spec.sinks[layer], spec.alibi,
            qkv.stride(0), layer_view.stride(0), layer_view.stride(1), self._block_tables.stride(0),
            self._num_splits, self._min_tiles, scale_log2,
            GROUP=spec.group, HEAD_DIM=head_dim, TOKENS_PER_BLOCK=self._pool.shape[4], WINDOW=window, CAP=cap,
            BLOCK_M=max(_MIN_ROWS, triton.next_power_of_2(spec.group)), BLOCK_N=self._block_n, BLOCK_D=block_d,
            num_warps=_NUM_WARPS, num_stages=_NUM_STAGES,
        )  # fmt: skip
        if self._num_splits > 1:
            _reduce_kernel[(self._num_seqs, triton.cdiv(spec.num_heads, self._merged_heads))](
                self._partial, self._lse, out, self._seq_lens, self._min_tiles, spec.num_heads,
                HEAD_DIM=head_dim, NUM_SPLITS=self._num_splits, WINDOW=window, BLOCK_N=self._block_n, BLOCK_D=block_d,
                HEADS=self._merged_heads, num_warps=4 if self._num_splits > 4 else 1,
            )  # fmt: skip


def workspace_bytes(spec: AttentionSpec, device: torch.device, max_seqs: int) -> int:
    """Most memory of partial results, with their log-sum-exps, that decodes of up to `max_seqs` sequences take."""
    processors = _num_processors(device)
    most_partials = max(
        num_seqs * choose_num_splits(num_seqs * spec.num_kv_heads, processors) for num_seqs in range(1, max_seqs + 1)
    )
    return most_partials * spec.num_heads * (spec.v_dim + 1) * 4


def _num_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return _INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)

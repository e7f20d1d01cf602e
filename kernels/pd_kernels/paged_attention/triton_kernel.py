"""Paged attention in Triton: online softmax over blocks of the cache (FlashAttention, arXiv 2205.14135).

A step's decodes go to `decode_kernel`, prompts with nothing cached to `fresh_prefill` where that can take them, and all
other prefills to the kernel here. A program of it owns a tile of rows of one sequence and key head; a row is a (new
token, query head of the group) pair, so the heads that share keys share their loads. Scores and sums are float32.
"""

from __future__ import annotations

from itertools import groupby

import triton
import triton.language as tl
from torch import Tensor, empty

from pd_kernels.paged_attention import fresh_prefill
from pd_kernels.paged_attention.batch import PagedBatch
from pd_kernels.paged_attention.decode_kernel import LOG2_E, DecodeAttention

_BLOCK_M = 64


# Not specialized: what changes from step to step, because each specialization is compiled while requests wait.
@triton.jit(  # type: ignore[untyped-decorator,unused-ignore]
    do_not_specialize=["table_stride", "first_seq"],
    do_not_specialize_on_alignment=["q_starts_ptr", "seq_lens_ptr", "block_tables_ptr"],
)
def _prefill_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, layer_ptr, out_ptr, q_starts_ptr, seq_lens_ptr, block_tables_ptr,
    qkv_stride, out_stride, block_stride, kv_stride, table_stride,
    first_seq, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    seq = (first_seq + tl.program_id(1)).to(tl.int64)
    kv_head = tl.program_id(2)
    q_start = tl.load(q_starts_ptr + seq).to(tl.int64)
    q_len = (tl.load(q_starts_ptr + seq + 1).to(tl.int64) - q_start).to(tl.int32)
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= q_len * GROUP:
        return
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)
    rows = first_row + tl.arange(0, BLOCK_M)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    positions = seq_len - q_len + tokens
    columns = tl.arange(0, BLOCK_D)
    in_head = columns < HEAD_DIM
    in_tile = (tokens < q_len)[:, None] & in_head[None, :]
    q_offsets = (q_start + tokens)[:, None] * qkv_stride + (heads * HEAD_DIM)[:, None] + columns[None, :]
    q = tl.load(qkv_ptr + q_offsets, mask=in_tile, other=0.0)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = tl.minimum(seq_len, seq_len - q_len + (first_row + BLOCK_M - 1) // GROUP + 1)
    for start in range(0, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        in_seq = at < end
        blocks = tl.load(block_tables_ptr + seq * table_stride + at // TOKENS_PER_BLOCK, mask=in_seq, other=0)
        kv_rows = blocks.to(tl.int64) * block_stride
        kv_rows += (kv_head * TOKENS_PER_BLOCK + at % TOKENS_PER_BLOCK) * HEAD_DIM
        keys = tl.load(
            layer_ptr + kv_rows[None, :] + columns[:, None], mask=in_seq[None, :] & in_head[:, None], other=0.0
        )
        scores = tl.dot(q, keys, input_precision="ieee") * scale_log2
        visible = in_seq[None, :] & (at[None, :] <= positions[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        rescale = tl.exp2(highest - new_highest)
        total = total * rescale + tl.sum(weights, 1)
        values = tl.load(
            layer_ptr + kv_stride + kv_rows[:, None] + columns[None, :],
            mask=in_seq[:, None] & in_head[None, :],
            other=0.0,
        )
        acc = acc * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = new_highest

    out_offsets = (q_start + tokens)[:, None] * out_stride + (heads * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(out_ptr + out_offsets, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_tile)


class TritonPlan:
    """See `pd_kernels.paged_attention.plan`."""

    def __init__(self, batch: PagedBatch, pool: Tensor, num_heads: int) -> None:
        if not pool.is_contiguous():
            raise ValueError("the pool must be dense")
        self._batch, self._pool, self._num_heads = batch, pool, num_heads
        self._decodes: DecodeAttention | None = None
        if batch.num_decodes:
            self._decodes = DecodeAttention(
                batch.seq_lens_tensor, batch.block_tables, pool, batch.num_decodes, num_heads
            )
        self._fresh, self._over_cache = self._split_prefills()

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        head_dim = self._pool.shape[-1]
        if self._fresh == [(0, qkv.shape[0])]:
            return fresh_prefill.attend(qkv, self._num_heads, head_dim)
        out = empty((qkv.shape[0], self._num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
        if self._decodes:
            self._decodes.run(qkv, layer, out)
        for start, stop in self._fresh:
            out[start:stop] = fresh_prefill.attend(qkv[start:stop], self._num_heads, head_dim)
        for first, stop in self._over_cache:
            self._prefill(qkv, out, layer, first, stop)
        return out

    def _split_prefills(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Tokens [start, stop) of each fresh prompt, and runs [first, stop) of the sequences that need the cache."""
        batch, fresh, over_cache = self._batch, [], []
        supported = fresh_prefill.is_supported(self._pool)
        token = batch.num_decodes
        prefills = range(batch.num_decodes, len(batch.q_lens))
        for is_fresh, run in groupby(prefills, lambda seq: supported and batch.q_lens[seq] == batch.seq_lens[seq]):
            seqs = list(run)
            if not is_fresh:
                over_cache.append((seqs[0], seqs[-1] + 1))
            for seq in seqs:
                if is_fresh:
                    fresh.append((token, token + batch.q_lens[seq]))
                token += batch.q_lens[seq]
        return fresh, over_cache

    def _prefill(self, qkv: Tensor, out: Tensor, layer: int, first: int, stop: int) -> None:
        """Attend for sequences [`first`, `stop`)."""
        batch, layer_view = self._batch, self._pool[:, layer]
        num_kv_heads, tokens_per_block, head_dim = self._pool.shape[3:]
        group = self._num_heads // num_kv_heads
        num_tiles = triton.cdiv(max(batch.q_lens[first:stop]) * group, _BLOCK_M)
        _prefill_kernel[(num_tiles, stop - first, num_kv_heads)](
            qkv, layer_view, out, batch.q_starts, batch.seq_lens_tensor, batch.block_tables,
            qkv.stride(0), out.stride(0), layer_view.stride(0), layer_view.stride(1), batch.block_tables.stride(0),
            first, LOG2_E / head_dim**0.5,
            GROUP=group, HEAD_DIM=head_dim, TOKENS_PER_BLOCK=tokens_per_block,
            BLOCK_M=_BLOCK_M, BLOCK_N=64 if head_dim <= 128 else 32,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)), num_warps=4, num_stages=2,
        )  # fmt: skip

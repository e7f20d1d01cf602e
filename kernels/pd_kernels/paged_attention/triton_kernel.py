"""Paged attention in Triton: online softmax over blocks of the cache (FlashAttention, arXiv 2205.14135).

One kernel serves prefill and decode. A program owns a tile of rows of one sequence and key head; a row is a (new
token, query head of the group) pair, so the heads that share keys share their loads, and a decode still fills the
smallest tile a tensor core takes. Scores and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty

from pd_kernels.paged_attention.batch import PagedBatch

_DECODE_ROWS = 16
_PREFILL_ROWS = 64
_LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _paged_attention_kernel(  # type: ignore[no-untyped-def]
    qkv_ptr, layer_ptr, out_ptr, q_starts_ptr, seq_lens_ptr, block_tables_ptr,
    qkv_stride, out_stride, block_stride, kv_stride, table_stride,
    first_seq, tokens_per_block, scale_log2,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    seq = first_seq + tl.program_id(1)
    kv_head = tl.program_id(2)
    q_start = tl.load(q_starts_ptr + seq).to(tl.int64)
    q_len = tl.load(q_starts_ptr + seq + 1).to(tl.int64) - q_start
    first_row = tl.program_id(0) * BLOCK_M
    if first_row >= q_len * GROUP:
        return
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int64)
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
        blocks = tl.load(block_tables_ptr + seq * table_stride + at // tokens_per_block, mask=in_seq, other=0)
        kv_rows = blocks.to(tl.int64) * block_stride
        kv_rows += (kv_head * tokens_per_block + at % tokens_per_block) * HEAD_DIM
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
        self._batch = batch
        self._pool = pool
        self._num_heads = num_heads

    def run(self, qkv: Tensor, layer: int) -> Tensor:
        head_dim = self._pool.shape[-1]
        out = empty((qkv.shape[0], self._num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
        num_decodes, num_seqs = self._batch.num_decodes, len(self._batch.q_lens)
        if num_decodes:
            self._launch(qkv, out, layer, 0, num_decodes, _DECODE_ROWS)
        if num_decodes < num_seqs:
            self._launch(qkv, out, layer, num_decodes, num_seqs, _PREFILL_ROWS)
        return out

    def _launch(self, qkv: Tensor, out: Tensor, layer: int, first: int, stop: int, rows: int) -> None:
        """Attend for sequences [`first`, `stop`) in tiles of `rows` rows."""
        batch, keys = self._batch, self._pool[:, layer]
        num_kv_heads, tokens_per_block, head_dim = self._pool.shape[3:]
        group = self._num_heads // num_kv_heads
        num_tiles = triton.cdiv(max(batch.q_lens[first:stop]) * group, rows)
        _paged_attention_kernel[(num_tiles, stop - first, num_kv_heads)](
            qkv, keys, out, batch.q_starts, batch.seq_lens_tensor, batch.block_tables,
            qkv.stride(0), out.stride(0), keys.stride(0), keys.stride(1), batch.block_tables.stride(0),
            first, tokens_per_block, _LOG2_E / head_dim**0.5,
            GROUP=group, HEAD_DIM=head_dim,
            BLOCK_M=rows, BLOCK_N=64 if head_dim <= 128 else 32, BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        )  # fmt: skip

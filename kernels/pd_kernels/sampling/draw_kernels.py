"""The first and the last kernels of sampling: what each chunk holds, and which token is drawn.

Between them, top-k and top-p raise a row's threshold (`search_kernels`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pd_kernels.sampling.chunks import is_greedy, kernel, load_chunk, load_scale, row_peak, weigh

NOWHERE = tl.constexpr(2147483647)


@kernel
def scan_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, peak_ptr, lowest_ptr, sum_ptr, best_ptr, threshold_ptr,
    row_stride, vocab_size,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = row * tl.num_programs(0) + chunk
    ids, logits = load_chunk(logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED, BLOCK)
    peak = tl.max(logits, axis=0)
    tl.store(peak_ptr + at, peak)
    tl.store(best_ptr + at, tl.min(tl.where(logits == peak, ids, NOWHERE), axis=0))
    if temperature_ptr is not None:  # noqa: SIM102  (Triton would compile both conditions)
        if not is_greedy(temperature_ptr, row):
            weights = weigh(logits, peak, load_scale(temperature_ptr, row))
            # A chunk of nothing but -inf has no weights.
            tl.store(sum_ptr + at, tl.where(peak > float("-inf"), tl.sum(weights, axis=0), 0.0))
            tl.store(lowest_ptr + at, tl.min(tl.where(logits > float("-inf"), logits, float("inf")), axis=0))
            if chunk == 0:
                tl.store(threshold_ptr + row, float("-inf"))


@kernel
def min_p_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, min_p_ptr, peak_ptr, sum_ptr, threshold_ptr,
    row_stride, vocab_size, num_chunks,
    CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    if is_greedy(temperature_ptr, row) | (min_p <= 0):
        return
    at, scale = row * num_chunks + chunk, load_scale(temperature_ptr, row)
    _, logits = load_chunk(logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED, BLOCK)
    shares = weigh(logits, row_peak(peak_ptr, row, num_chunks, CHUNKS), scale)
    kept = (logits >= tl.load(threshold_ptr + row)) & (shares >= min_p)
    weights = weigh(logits, tl.load(peak_ptr + at), scale)
    tl.store(sum_ptr + at, tl.sum(tl.where(kept, weights, 0.0), axis=0))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _pick(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, min_p_ptr, number_ptr, peaks, sum_ptr, threshold_ptr,
    row_stride, vocab_size, num_chunks, row,
    CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token of a row whose cumulative weight exceeds the number's share of the total."""
    chunks, scale = tl.arange(0, CHUNKS), load_scale(temperature_ptr, row)
    peak = tl.max(peaks, axis=0)
    sums = tl.load(sum_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=0.0)
    sums = tl.where(sums > 0, sums * weigh(peaks, peak, scale), 0.0).to(tl.float64)
    cumulative = tl.cumsum(sums, axis=0)
    goal = tl.load(number_ptr + row).to(tl.float64) * tl.sum(sums, axis=0)
    # Rounding may put the goal past the end.
    last = tl.max(tl.where(sums > 0, chunks, 0), axis=0)
    chunk = tl.minimum(tl.min(tl.where(cumulative > goal, chunks, NOWHERE), axis=0), last)
    goal -= tl.sum(tl.where(chunks < chunk, sums, 0.0), axis=0)

    ids, logits = load_chunk(logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED, BLOCK)
    weights = weigh(logits, peak, scale)
    kept = (logits >= tl.load(threshold_ptr + row)) & (weights > 0)
    if min_p_ptr is not None:
        kept &= weights >= tl.load(min_p_ptr + row).to(tl.float32)
    cumulative = tl.cumsum(tl.where(kept, weights, 0.0).to(tl.float64), axis=0)
    token = tl.min(tl.where(kept & (cumulative > goal), ids, NOWHERE), axis=0)
    return tl.minimum(token, tl.max(tl.where(kept, ids, 0), axis=0))


@kernel
def draw_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, min_p_ptr, number_ptr, peak_ptr, sum_ptr, best_ptr, threshold_ptr, out_ptr,
    row_stride, vocab_size, num_chunks,
    CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    at, there = row * num_chunks + chunks, chunks < num_chunks
    peaks = tl.load(peak_ptr + at, mask=there, other=float("-inf"))
    is_best = there & (peaks == tl.max(peaks, axis=0))
    token = tl.min(tl.load(best_ptr + at, mask=is_best, other=NOWHERE), axis=0)
    if temperature_ptr is not None:  # noqa: SIM102  (Triton would compile both conditions)
        if not is_greedy(temperature_ptr, row):
            token = _pick(
                logits_ptr, temperature_ptr, min_p_ptr, number_ptr, peaks, sum_ptr, threshold_ptr, row_stride,
                vocab_size, num_chunks, row, CHUNKS, ALIGNED, BLOCK,
            )  # fmt: skip
    # A row of nothing but NaN has no best token.
    tl.store(out_ptr + row, tl.minimum(token, vocab_size - 1).to(tl.int64))

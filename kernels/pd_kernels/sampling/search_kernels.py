"""The threshold of top-k or top-p: the largest logit t such that the tokens with logits >= t reach a target.

The target is a number of tokens (COUNT) or a share of the probability. It is found without sorting: `narrow_kernel`,
run some times, cuts the interval that holds t into equal parts and measures what each chunk has above each cut;
`collect_kernel` lists each chunk's logits in the part that is left, in the vocabulary's order, and `decide_kernel`, one
program a row, bisects over that list down to one number. For logits spread like a normal distribution some thousand of
128256 are left to it, and it holds them in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pd_kernels.sampling.chunks import (
    from_key,
    is_searched,
    kernel,
    load_chunk,
    load_scale,
    row_peak,
    to_key,
    weigh,
)

# exp(-110) is 0 in float32: whether such a token is kept makes no difference.
NEGLIGIBLE = tl.constexpr(110.0)
# Added to the depth at which top-p's threshold must lie, for the rounding of what it is computed from.
SLACK = tl.constexpr(0.01)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _first_interval(  # type: ignore[no-untyped-def]
    temperature_ptr, limit_ptr, peak_ptr, lowest_ptr, sum_ptr, threshold_ptr, row, num_chunks, vocab_size,
    COUNT: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The interval that must hold the threshold, and what the tokens above the threshold must reach."""
    chunks = tl.arange(0, CHUNKS)
    at, there = row * num_chunks + chunks, chunks < num_chunks
    peaks = tl.load(peak_ptr + at, mask=there, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    lowest = tl.min(tl.load(lowest_ptr + at, mask=there, other=float("inf")), axis=0)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    limit = tl.load(limit_ptr + row).to(tl.float32)
    if COUNT:
        target = limit
        depth = NEGLIGIBLE
    else:
        sums = tl.load(sum_ptr + at, mask=there, other=0.0)
        sums = tl.where(sums > 0, sums * weigh(peaks, peak, load_scale(temperature_ptr, row)), 0.0)
        total = tl.sum(sums, axis=0)
        target = limit * total
        # All tokens that weigh less than (1 - p) total / vocab_size weigh less than (1 - p) total together.
        depth = tl.log(vocab_size / ((1.0 - limit) * total)) + SLACK
        lowest = tl.maximum(lowest, tl.load(threshold_ptr + row))
    low = tl.maximum(lowest, peak - depth * temperature)
    return low, from_key(to_key(peak) + 1), target


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _cut(low, high, NUM_PIVOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pivots that cut an interval into equal parts."""
    share = (tl.arange(0, NUM_PIVOTS) + 1) * (1.0 / (NUM_PIVOTS + 1))
    # Explicitly one operation: threads that compare and threads that store compute this apart, and must agree.
    pivots = tl.fma(share, tl.zeros_like(share) + (high - low), tl.zeros_like(share) + low)
    return tl.minimum(tl.maximum(pivots, low), high)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _narrowed(  # type: ignore[no-untyped-def]
    interval_ptr, pivot_ptr, reached_ptr, row, num_chunks, NUM_PIVOTS: tl.constexpr, CHUNKS: tl.constexpr
):
    """The part of an interval that holds the threshold, by what each chunk has at the pivots."""
    low, high, target = _load_interval(interval_ptr, row)
    parts, chunks = tl.arange(0, NUM_PIVOTS), tl.arange(0, CHUNKS)
    # Loaded, not computed again: another kernel may round them otherwise.
    pivots = tl.load(pivot_ptr + row * NUM_PIVOTS + parts)
    at = (row * num_chunks + chunks[:, None]) * NUM_PIVOTS + parts[None, :]
    reached = tl.sum(tl.load(reached_ptr + at, mask=(chunks < num_chunks)[:, None], other=0.0), axis=0)
    new_low = tl.max(tl.where(reached >= target, pivots, low), axis=0)
    new_high = tl.min(tl.where(reached >= target, high, pivots), axis=0)
    return new_low, new_high, target


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load_interval(interval_ptr, row):  # type: ignore[no-untyped-def]
    """From, to (exclusive), and what the tokens from the threshold on must reach."""
    at = interval_ptr + row * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _store_interval(interval_ptr, row, low, high, target):  # type: ignore[no-untyped-def]
    at = interval_ptr + row * 3
    tl.store(at, low)
    tl.store(at + 1, high)
    tl.store(at + 2, target)


@kernel
def narrow_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, limit_ptr, peak_ptr, lowest_ptr, sum_ptr, threshold_ptr,
    old_interval_ptr, old_pivot_ptr, old_reached_ptr, interval_ptr, pivot_ptr, reached_ptr,
    row_stride, vocab_size, num_chunks,
    COUNT: tl.constexpr, NUM_PIVOTS: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if not is_searched(temperature_ptr, limit_ptr, row, vocab_size, COUNT):
        return
    if old_interval_ptr is None:
        low, high, target = _first_interval(
            temperature_ptr, limit_ptr, peak_ptr, lowest_ptr, sum_ptr, threshold_ptr, row, num_chunks, vocab_size,
            COUNT, CHUNKS,
        )  # fmt: skip
    else:
        low, high, target = _narrowed(
            old_interval_ptr, old_pivot_ptr, old_reached_ptr, row, num_chunks, NUM_PIVOTS, CHUNKS
        )
    parts, pivots = tl.arange(0, NUM_PIVOTS), _cut(low, high, NUM_PIVOTS)
    if chunk == 0:
        _store_interval(interval_ptr, row, low, high, target)
        tl.store(pivot_ptr + row * NUM_PIVOTS + parts, pivots)
    reached = tl.zeros([NUM_PIVOTS], tl.float32)
    if tl.load(peak_ptr + row * num_chunks + chunk) >= low:
        _, logits = load_chunk(logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED, BLOCK)
        # A factor instead of a condition: comparing and adding are then two instructions, not three.
        above = (logits[None, :] >= pivots[:, None]).to(tl.float32)
        if COUNT:
            reached = tl.sum(above, axis=1)
        else:
            peak = row_peak(peak_ptr, row, num_chunks, CHUNKS)
            weights = weigh(logits, peak, load_scale(temperature_ptr, row))
            reached = tl.sum(above * weights[None, :], axis=1)
    tl.store(reached_ptr + (row * num_chunks + chunk) * NUM_PIVOTS + parts, reached)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _places(chosen, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many of a chunk's elements before each are chosen; in fours, which one thread holds, as scans are slow."""
    fours = tl.reshape(chosen.to(tl.int32), [BLOCK // 4, 4])
    totals = tl.sum(fours, axis=1)
    before = tl.cumsum(totals, axis=0) - totals
    return tl.reshape(before[:, None] + tl.cumsum(fours, axis=1) - fours, [BLOCK])


@kernel
def collect_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, temperature_ptr, limit_ptr, peak_ptr,
    old_interval_ptr, old_pivot_ptr, old_reached_ptr, interval_ptr,
    listed_ptr, num_listed_ptr, num_above_ptr, sum_above_ptr,
    row_stride, vocab_size, num_chunks,
    COUNT: tl.constexpr, NUM_PIVOTS: tl.constexpr, CHUNKS: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if not is_searched(temperature_ptr, limit_ptr, row, vocab_size, COUNT):
        return
    low, high, target = _narrowed(old_interval_ptr, old_pivot_ptr, old_reached_ptr, row, num_chunks, NUM_PIVOTS, CHUNKS)
    if chunk == 0:
        _store_interval(interval_ptr, row, low, high, target)
    at = row * num_chunks + chunk
    num_listed, num_above, sum_above = 0, 0.0, 0.0
    if tl.load(peak_ptr + at) >= low:
        _, logits = load_chunk(logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED, BLOCK)
        inside = (logits >= low) & (logits < high)
        num_listed = tl.sum(inside.to(tl.int32), axis=0)
        if num_listed > 0:
            tl.store(listed_ptr + at * BLOCK + _places(inside, BLOCK), logits, mask=inside)
        above = (logits >= high).to(tl.float32)
        weights = weigh(logits, row_peak(peak_ptr, row, num_chunks, CHUNKS), load_scale(temperature_ptr, row))
        sum_above = tl.sum(above * weights, axis=0)
        num_above = tl.sum(above, axis=0)
    tl.store(num_listed_ptr + at, num_listed)
    tl.store(sum_above_ptr + at, sum_above)
    tl.store(num_above_ptr + at, num_above)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _load_listed(  # type: ignore[no-untyped-def]
    listed_ptr, row, num_chunks, num_listed, start, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Listed logits [CHUNKS, SLOTS] of all chunks, from the `start`-th on; -inf where a chunk has no more."""
    slots = start + tl.arange(0, SLOTS)
    at = (row * num_chunks + tl.arange(0, CHUNKS)[:, None]) * BLOCK + slots[None, :]
    return tl.load(listed_ptr + at, mask=slots[None, :] < num_listed[:, None], other=float("-inf"))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _measure(logits, peak, scale, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What listed logits add to what is to reach the target."""
    if COUNT:
        return tl.where(logits > float("-inf"), 1.0, 0.0)
    else:  # noqa: RET505  (Triton wants both branches)
        return weigh(logits, peak, scale)


@kernel
def decide_kernel(  # type: ignore[no-untyped-def]
    temperature_ptr, limit_ptr, peak_ptr, sum_ptr, threshold_ptr,
    interval_ptr, listed_ptr, num_listed_ptr, num_above_ptr, sum_above_ptr,
    vocab_size, num_chunks,
    COUNT: tl.constexpr, SLOTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if not is_searched(temperature_ptr, limit_ptr, row, vocab_size, COUNT):
        return
    chunks = tl.arange(0, CHUNKS)
    at, there = row * num_chunks + chunks, chunks < num_chunks
    num_listed = tl.load(num_listed_ptr + at, mask=there, other=0)
    most = tl.max(num_listed, axis=0)
    sums = tl.load(sum_above_ptr + at, mask=there, other=0.0)
    if COUNT:  # noqa: SIM108  (Triton would compile both)
        above = tl.sum(tl.load(num_above_ptr + at, mask=there, other=0.0), axis=0)
    else:
        above = tl.sum(sums, axis=0)
    peak = row_peak(peak_ptr, row, num_chunks, CHUNKS)
    scale = load_scale(temperature_ptr, row)
    # Mostly all that is listed is in this tile.
    first = _load_listed(listed_ptr, row, num_chunks, num_listed, 0, SLOTS, CHUNKS, BLOCK)
    measured = _measure(first, peak, scale, COUNT)
    lowest, end, target = _load_interval(interval_ptr, row)
    low, high = to_key(lowest).to(tl.int64), to_key(end).to(tl.int64) - 1
    while low < high:
        middle = low + (high - low + 1) // 2
        pivot = from_key(middle.to(tl.int32))
        reached = above + tl.sum(tl.where(first >= pivot, measured, 0.0))
        for start in range(SLOTS, most, SLOTS):
            more = _load_listed(listed_ptr, row, num_chunks, num_listed, start, SLOTS, CHUNKS, BLOCK)
            reached += tl.sum(tl.where(more >= pivot, _measure(more, peak, scale, COUNT), 0.0))
        if reached >= target:
            low = middle
        else:
            high = middle - 1
    threshold = from_key(low.to(tl.int32))
    for start in range(0, most, SLOTS):
        more = _load_listed(listed_ptr, row, num_chunks, num_listed, start, SLOTS, CHUNKS, BLOCK)
        sums += tl.sum(tl.where(more >= threshold, weigh(more, peak, scale), 0.0), axis=1)
    tl.store(threshold_ptr + row, threshold)
    tl.store(sum_ptr + at, sums, mask=there)
    tl.store(peak_ptr + at, peak, mask=there)

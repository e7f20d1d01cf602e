"""What the sampling kernels share: reading a chunk of a row, weighing its tokens, and ordering floats as integers.

A token's weight is exp((logit - peak) / temperature). The peak is the chunk's largest logit in the scan's sums and the
row's after a filter; sums are brought to the same peak before they are added.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Below this, 1 / temperature would overflow; the draw is greedy long before.
LEAST_TEMPERATURE = tl.constexpr(1e-37)


def kernel(function: Callable[..., None]) -> Any:
    """A kernel that is compiled once for all batches: what varies between them must not change the order of a sum."""
    pointers = [name for name in inspect.signature(function).parameters if name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=["row_stride"], do_not_specialize_on_alignment=pointers)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def to_key(x):  # type: ignore[no-untyped-def]
    """An integer that orders like the float."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def from_key(key):  # type: ignore[no-untyped-def]
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def load_chunk(  # type: ignore[no-untyped-def]
    logits_ptr, row_stride, vocab_size, row, chunk, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Token ids and logits of a chunk; -inf past the vocabulary's end."""
    row_ptr = logits_ptr + row * row_stride
    if ALIGNED:
        row_ptr = tl.multiple_of(row_ptr, 16)
    ids = chunk * BLOCK + tl.arange(0, BLOCK)
    return ids, tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def load_scale(temperature_ptr, row):  # type: ignore[no-untyped-def]
    """1 / temperature, for base-2 exponentials."""
    return LOG2_E / tl.maximum(tl.load(temperature_ptr + row).to(tl.float32), LEAST_TEMPERATURE)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def weigh(logits, peak, scale):  # type: ignore[no-untyped-def]
    # Shifted before it is scaled, so that a tiny temperature can't overflow.
    return tl.exp2((logits - peak) * scale)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def row_peak(peak_ptr, row, num_chunks, CHUNKS: tl.constexpr):  # type: ignore[no-untyped-def]
    chunks = tl.arange(0, CHUNKS)
    peaks = tl.load(peak_ptr + row * num_chunks + chunks, mask=chunks < num_chunks, other=float("-inf"))
    return tl.max(peaks, axis=0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def is_greedy(temperature_ptr, row):  # type: ignore[no-untyped-def]
    return tl.load(temperature_ptr + row).to(tl.float32) <= 0


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def is_searched(temperature_ptr, limit_ptr, row, vocab_size, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether the row has a top-k (COUNT) or a top-p."""
    if COUNT:
        k = tl.load(limit_ptr + row).to(tl.int64)
        limited = (k > 0) & (k < vocab_size)
    else:
        limited = tl.load(limit_ptr + row).to(tl.float32) < 1
    return limited & (tl.load(temperature_ptr + row).to(tl.float32) > 0)

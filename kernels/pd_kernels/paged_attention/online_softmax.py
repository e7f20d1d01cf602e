"""Online softmax over tiles of keys (FlashAttention, arXiv 2205.14135): what decode and prefill kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def accumulate(scores, scale_log2, values, highest, total, acc):  # type: ignore[no-untyped-def]
    """Take one tile of keys into the running maximum, sum of weights and weighted sum of values, all float32.

    `scores` are unscaled, -inf where a row may not look; `values` are what it adds up, in the type it is computed in.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
    rescale = tl.exp2(highest - new_highest)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return new_highest, total, acc

"""Online softmax over tiles of keys (FlashAttention, arXiv 2205.14135): what decode and prefill kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from pd_kernels.paged_attention.spec import AttentionSpec

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


def score_factors(spec: AttentionSpec) -> tuple[float, float]:
    """What kernels take for a spec's scale and softcap: `scale_log2` and `CAP`, which is 0 without a softcap."""
    if spec.softcap is None:
        return spec.scale * LOG2_E, 0.0
    return spec.softcap * LOG2_E, 2 * LOG2_E * spec.scale / spec.softcap


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def capped(scores, CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The hyperbolic tangent of scaled scores where `CAP` asks for it: all that is left to do is to scale them."""
    if CAP > 0.0:
        scores = 1.0 - 2.0 / (tl.exp2(scores * CAP) + 1.0)
    return scores


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def load_slopes(slopes_ptr, heads, mask, scale_log2):  # type: ignore[no-untyped-def]
    """Slopes of heads as `accumulate` takes them: to be multiplied by `scale_log2`."""
    return tl.load(slopes_ptr + heads, mask=mask, other=0.0) * (_LOG2_E / scale_log2)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def load_sinks(sinks_ptr, heads, mask):  # type: ignore[no-untyped-def]
    """Sinks of heads as the running maximum that sums of weights start from."""
    return tl.load(sinks_ptr + heads, mask=mask, other=0.0) * _LOG2_E


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

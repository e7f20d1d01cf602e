"""Online softmax over tiles of keys (FlashAttention, arXiv 2205.14135): what decode and prefill kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from pd_kernels.paged_attention.spec import AttentionSpec

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
# Of a row that has seen no key of its window yet. Infinity would make a tile without one not a number.
_LOWEST = tl.constexpr(-1e30)


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
def start(  # type: ignore[no-untyped-def]
    sinks_ptr, heads, mask, with_sinks, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum of weights and weighted sum of values before any key; `with_sinks` where sinks count."""
    highest = tl.full([BLOCK_M], _LOWEST if WINDOW else float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + heads, mask=mask, other=0.0) * _LOG2_E
        highest = tl.where(with_sinks, sinks, highest)
        total += tl.where(with_sinks, 1.0, 0.0)
    return highest, total, acc


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

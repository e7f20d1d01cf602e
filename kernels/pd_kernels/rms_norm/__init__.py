"""RMSNorm over the last dimension, alone or fused with the residual addition before it (arXiv 1910.07467)."""

from __future__ import annotations

from torch import Tensor

from pd_kernels.rms_norm import reference


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """`x` scaled to unit root mean square over its last dimension, times `weight`.

    Args:
        x: [num_tokens, n] or [num_tokens, num_heads, n]; only the last dimension must be dense.
        weight: [n].
        out: where to write, same shape as `x` (may be `x`); a new dense tensor by default.
    """
    if x.is_cuda:
        from pd_kernels.rms_norm import triton_kernel

        return triton_kernel.rms_norm(x, weight, eps, out)
    return reference.rms_norm(x, weight, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place and return the sum's RMSNorm. All of [num_tokens, n], `weight` [n]."""
    if x.is_cuda:
        from pd_kernels.rms_norm import triton_kernel

        return triton_kernel.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)


__all__ = ["add_rms_norm", "rms_norm"]

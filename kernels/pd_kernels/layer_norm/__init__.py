"""LayerNorm over the last dimension, alone or fused with the residual addition before it (arXiv 1607.06450)."""

from __future__ import annotations

from torch import Tensor

from pd_kernels.layer_norm import reference


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`x` with zero mean and unit variance over its last dimension, times `weight`, plus `bias`.

    Args:
        x: [num_tokens, n]; only the last dimension must be dense.
        weight, bias: [n].
    """
    if x.is_cuda:
        from pd_kernels.layer_norm import triton_kernel

        return triton_kernel.layer_norm(x, weight, bias, eps)
    return reference.layer_norm(x, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Add `x` to `residual` in place and return the sum's LayerNorm. Both [num_tokens, n], `weight` and `bias` [n]."""
    if x.is_cuda:
        from pd_kernels.layer_norm import triton_kernel

        return triton_kernel.add_layer_norm(x, residual, weight, bias, eps)
    return reference.add_layer_norm(x, residual, weight, bias, eps)


__all__ = ["add_layer_norm", "layer_norm"]

"""SwiGLU's elementwise half: silu(gate) * up (arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from pd_kernels.silu_and_mul import reference


def silu_and_mul(x: Tensor) -> Tensor:
    """silu of the first half of each row times the second half: [num_tokens, 2 n] to [num_tokens, n]."""
    if x.is_cuda:
        from pd_kernels.silu_and_mul import triton_kernel

        return triton_kernel.silu_and_mul(x)
    return reference.silu_and_mul(x)


__all__ = ["silu_and_mul"]

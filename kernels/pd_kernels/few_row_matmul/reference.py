"""A matrix product in torch: the oracle of the Triton kernels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def few_row_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)

"""Matrix products with weights that never change."""

from __future__ import annotations

import platform

import torch
from torch import Tensor
from torch.nn import functional

from pd_kernels import few_row_matmul

# oneDNN chooses the layout for about this many rows; the same layout serves one row and a thousand within a few
# per cent, and choosing none costs half the speed of float32 decoding.
_PACKED_FOR_ROWS = 8


class Linear:
    """y = x W^T + b. On an x86 CPU the weight is repacked once into oneDNN's blocked layout.

    With the plain layout oneDNN would repack at each call: for SmolLM2-135M on two cores (torch 2.13), 8 rows times
    a [3072, 576] matrix take 208 us plain and 89 us packed in bfloat16, 565 and 213 us in float32. On a GPU a few rows,
    as a decode step has, are multiplied by a kernel of our own where it is faster.

    Args:
        weight: [num_outputs, num_inputs]; not kept if it is repacked.
        bias: [num_outputs].
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._packed = _can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS) if self._packed else weight
        self._bias = bias
        self._takes_few_rows = few_row_matmul.is_supported(weight)
        if self._takes_few_rows:
            few_row_matmul.prepare(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """[num_tokens, num_outputs] for `x` [num_tokens, num_inputs]."""
        if self._packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return product
        if self._takes_few_rows:
            return few_row_matmul.few_row_matmul(x, self._weight, self._bias)
        return functional.linear(x, self._weight, self._bias)


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    if not torch._C._has_mkldnn:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32

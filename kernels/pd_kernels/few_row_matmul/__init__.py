"""Products of a few rows with a large matrix, as decoding makes them: bound by reading the matrix once.

For Hopper GPUs. Nothing but the shape decides whether torch's own product is replaced (`tiling`), so a step gives the
same numbers inside a CUDA graph and outside.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pd_kernels.few_row_matmul import reference
from pd_kernels.few_row_matmul.tiling import MAX_ROWS, Tiling, choose


def is_supported(weight: Tensor) -> bool:
    """Whether `few_row_matmul` can take `weight` [num_outputs, num_inputs], and was measured on its device."""
    return (
        weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
        and torch.cuda.get_device_capability(weight.device) == (9, 0)
    )


def few_row_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: [num_rows, num_outputs], summed in float32, the same every time; by torch where that is as fast.

    A process may run one product at a time on a device, on one stream: the programs of all products share the counters
    by which those that share a sum find out who is last.

    Args:
        x: [num_rows, num_inputs] of the weight's type, with dense rows.
        weight: [num_outputs, num_inputs]; see `is_supported`.
        bias: [num_outputs].
    """
    tiling = tiling_for(len(x), weight)
    if tiling is None:
        return reference.few_row_matmul(x, weight, bias)
    from pd_kernels.few_row_matmul import triton_kernel

    return triton_kernel.few_row_matmul(x, weight, bias, tiling)


def tiling_for(num_rows: int, weight: Tensor) -> Tiling | None:
    """How `few_row_matmul` multiplies `num_rows` rows with a supported `weight`; None: as torch does."""
    if num_rows > MAX_ROWS:
        return None
    return _choose(num_rows, *weight.shape, _num_processors(weight.device))


def prepare(weight: Tensor, bias: Tensor | None) -> None:
    """Compile now what products with `weight` of any few rows would compile when they first occur."""
    for num_rows in (1, 2, MAX_ROWS):
        if tiling_for(num_rows, weight) is not None:
            few_row_matmul(weight.new_zeros(num_rows, weight.shape[1]), weight, bias)


_choose = functools.cache(choose)


@functools.cache
def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


__all__ = ["Tiling", "few_row_matmul", "is_supported", "prepare", "tiling_for"]

"""LayerNorm in Triton: one program a row, statistics in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _layer_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, x_stride, n, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * n + columns
        residual = tl.load(residual_ptrs, mask=inside, other=0.0)
        # Round the sum to the residual's type before normalising it: the next layer reads the rounded sum too.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, x, mask=inside)
    x = x.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / n, 0.0)
    normed = centred / tl.sqrt(tl.sum(centred * centred, axis=0) / n + eps)
    normed *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * n + columns, normed.to(out_ptr.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _launch(x, None, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if not residual.is_contiguous():
        raise ValueError("the residual must be dense")
    return _launch(x, residual, weight, bias, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    if x.stride(-1) != 1:
        raise ValueError("the last dimension must be dense")
    num_tokens, n = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(n)
        _layer_norm_kernel[(num_tokens,)](
            x, residual, weight, bias, out, x.stride(0), n, eps, BLOCK=block, num_warps=4 if block <= 2048 else 8
        )
    return out

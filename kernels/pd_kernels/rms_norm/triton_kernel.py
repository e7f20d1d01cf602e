"""RMSNorm in Triton: one program a row, statistics in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, out_ptr,
    num_heads, x_token_stride, x_head_stride, out_token_stride, out_head_stride,
    n, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token, head = row // num_heads, row % num_heads
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    x = tl.load(x_ptr + token * x_token_stride + head * x_head_stride + columns, mask=inside, other=0.0)
    if ADD:
        residual_ptrs = residual_ptr + row * n + columns
        residual = tl.load(residual_ptrs, mask=inside, other=0.0)
        # Round the sum to the residual's type before normalising it: the next layer reads the rounded sum too.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(residual.dtype)
        tl.store(residual_ptrs, x, mask=inside)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / n + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + token * out_token_stride + head * out_head_stride + columns
    tl.store(out_ptrs, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads, out_heads = (x[:, None], out[:, None]) if x.dim() == 2 else (x, out)
    _launch(heads, None, weight, out_heads, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not residual.is_contiguous():
        raise ValueError("the residual must be dense")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x[:, None], residual, weight, out[:, None], eps)
    return out


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    """`x` and `out` [num_tokens, num_heads, n]."""
    if x.stride(-1) != 1 or out.stride(-1) != 1:
        raise ValueError("the last dimension must be dense")
    num_tokens, num_heads, n = x.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(n)
    _rms_norm_kernel[(num_tokens * num_heads,)](
        x, residual, weight, out,
        num_heads, x.stride(0), x.stride(1), out.stride(0), out.stride(1),
        n, eps,
        ADD=residual is not None, BLOCK=block, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip

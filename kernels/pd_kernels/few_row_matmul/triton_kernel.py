"""Products of a few rows with a large matrix in Triton: wide loads of the matrix, each element read once.

One row: a program multiplies a few rows of the matrix elementwise with `x` and adds up at the end. Several rows: tensor
cores, with the matrix's rows in the large dimension of a tile and those of `x` in the small one. Where that gives too
few programs, several share a sum over the inputs; the last of them to arrive, by a counter of the tile, adds the parts
up in their order, which doesn't depend on who was last.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_kernels.few_row_matmul.tiling import Tiling

# More tiles than a product whose sums are shared ever has: their programs are at most one a processor.
_MAX_SHARED_TILES = 1024


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _one_row_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, out_ptr, n, k,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one instead.
    weight_ptrs = weight_ptr + tl.minimum(outputs, n - 1).to(tl.int64)[:, None] * k + inputs[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, k, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            weight = tl.load(weight_ptrs, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + inputs)
        else:
            inside = start + inputs < k
            weight = tl.load(weight_ptrs, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + start + inputs, mask=inside, other=0.0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
        weight_ptrs += BLOCK_K
    product = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + outputs, mask=outputs < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + outputs, product.to(out_ptr.dtype.element_ty), mask=outputs < n)


@triton.jit(do_not_specialize=["num_rows", "num_splits"])  # type: ignore[untyped-decorator,unused-ignore]
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, bias_ptr, out_ptr, partial_ptr, arrivals_ptr,
    num_rows, n, k, x_stride, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, tile = tl.program_id(0), tl.program_id(1)
    share = tl.cdiv(k // BLOCK_K, num_splits) * BLOCK_K
    outputs = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_M)
    inputs = split * share + tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + tl.minimum(outputs, n - 1).to(tl.int64)[:, None] * k + inputs[None, :]
    x_ptrs = x_ptr + rows[None, :] * x_stride + inputs[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in tl.range(0, tl.minimum(share, k - split * share), BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptrs, eviction_policy="evict_first")
        x = tl.load(x_ptrs, mask=(rows < num_rows)[None, :], other=0.0)
        acc = tl.dot(weight, x, acc)
        weight_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
    if SHARED:
        inside = rows[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        parts_ptr = partial_ptr + tile * num_splits * (BLOCK_M * BLOCK_N)
        tl.store(parts_ptr + split * (BLOCK_M * BLOCK_N) + inside, acc)
        # All threads have stored before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") != num_splits - 1:
            return
        tl.debug_barrier()
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for part in range(num_splits):
            # From the L2 cache: this processor's own may hold what was there before.
            acc += tl.load(parts_ptr + part * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
        tl.store(arrivals_ptr + tile, 0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + outputs, mask=outputs < n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        out_ptr + rows[None, :] * n + outputs[:, None],
        acc.to(out_ptr.dtype.element_ty),
        mask=(rows < num_rows)[None, :] & (outputs < n)[:, None],
    )


def few_row_matmul(x: Tensor, weight: Tensor, bias: Tensor | None, tiling: Tiling) -> Tensor:
    (num_rows, k), n = x.shape, weight.shape[0]
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError("rows must be dense")
    out = torch.empty((num_rows, n), dtype=x.dtype, device=x.device)
    num_tiles = triton.cdiv(n, tiling.block_n)
    if tiling.block_m == 1:
        _one_row_kernel[(num_tiles,)](
            x, weight, bias, out, n, k,
            BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, EVEN_K=k % tiling.block_k == 0, STAGES=tiling.num_stages,
            num_warps=tiling.num_warps,
        )  # fmt: skip
        return out
    is_shared = tiling.num_splits > 1
    partial = arrivals = None
    if is_shared:
        shape = (num_tiles, tiling.num_splits, tiling.block_m, tiling.block_n)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        arrivals = _arrivals(x.device)
    _rows_kernel[(tiling.num_splits, num_tiles)](
        x, weight, bias, out, partial, arrivals,
        num_rows, n, k, x.stride(0), tiling.num_splits,
        BLOCK_M=tiling.block_m, BLOCK_N=tiling.block_n, BLOCK_K=tiling.block_k, SHARED=is_shared,
        STAGES=tiling.num_stages,
        num_warps=tiling.num_warps,
    )  # fmt: skip
    return out


@functools.cache
def _arrivals(device: torch.device) -> Tensor:
    """The counters, 0 between products."""
    return torch.zeros(_MAX_SHARED_TILES, dtype=torch.int32, device=device)

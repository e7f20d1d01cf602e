"""Writing keys and values into the paged cache: alone, or fused with the rotary embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from pd_kernels.rope_cache import reference


def rope_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int
) -> None:
    """Rotate queries and keys of `qkv` in place, and write keys and values to their slots of `pool`.

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], dense rows.
        cos, sin: [num_tokens, head_dim / 2] float32; dimension i is paired with i + head_dim / 2.
        slots: [num_tokens] int64, block * tokens_per_block + offset; all different. A negative one, of a padding row
            of a CUDA graph, writes nothing.
        pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense, of `qkv`'s type or of
            float8_e4m3fn: then what is beyond its range (448) is written as its largest value. `qkv` keeps its own.
        layer: which layer of `pool`.
    """
    if qkv.is_cuda:
        from pd_kernels.rope_cache import triton_kernel

        triton_kernel.rope_and_cache(qkv, cos, sin, slots, pool, layer, num_heads)
    else:
        reference.rope_and_cache(qkv, cos, sin, slots, pool, layer, num_heads)


def write_cache(qkv: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int) -> None:
    """Write keys and values of `qkv` to their slots of `pool`, for models that rotate nothing; see `rope_and_cache`."""
    if qkv.is_cuda:
        from pd_kernels.rope_cache import triton_kernel

        triton_kernel.write_cache(qkv, slots, pool, layer, num_heads)
    else:
        reference.write_cache(qkv, slots, pool, layer, num_heads)


__all__ = ["rope_and_cache", "write_cache"]

"""What cuDNN's fused attention computes of long prefills: squares and rectangles of a few prepared sizes.

On an H200 cuDNN is a fifth faster than our kernel, but it takes 28 ms to prepare each new shape, knows no paged cache
and no causal mask but a square one. So whole multiples of ROW_STEP new tokens attend over themselves in one square, and
over whole multiples of KEY_STEP cached tokens in rectangles of a power of two of rows, and `prepare` runs each such
shape once. What is left of rows and keys is the Triton kernel's, which also weighs the parts together.

torch keeps cuDNN's preparations by thread: `prepare` and the plans must run on the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_kernels.paged_attention.layout import Partial
from pd_kernels.paged_attention.spec import AttentionSpec

ROW_STEP = 1024
KEY_STEP = 4096
_KEY_LENGTHS_PER_OCTAVE = 4
_MAX_KEYS = 131072
# Below, our kernel is as fast as cuDNN and a copy of its output.
_MIN_FRESH_TOKENS = 2048
_MAX_HEAD_DIM = 128
_MIN_CAPABILITY = (9, 0)


def declines(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why cuDNN is not to attend for queries of `dtype`: it can't, or is no faster than our kernel. None: it is."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "cuDNN needs a CUDA GPU"
    if spec.extras:
        return f"cuDNN knows no {', '.join(spec.extras)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"cuDNN needs 16 bits, not {dtype}"
    if spec.qk_dim % 8 or spec.qk_dim > _MAX_HEAD_DIM:
        return f"cuDNN needs heads of a multiple of 8 up to {_MAX_HEAD_DIM}, not of {spec.qk_dim}"
    if not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call,unused-ignore]
        return "torch has no cuDNN"
    if torch.cuda.get_device_capability(device) < _MIN_CAPABILITY:
        return "cuDNN is no faster on this GPU"
    return None


def rows_of_fresh(num_tokens: int) -> int:
    """How many tokens of a prompt with nothing cached, from its first one, are cuDNN's."""
    return _multiple(num_tokens, ROW_STEP) if num_tokens >= _MIN_FRESH_TOKENS else 0


def part_over_cache(num_tokens: int, num_cached: int) -> tuple[int, int]:
    """How many new tokens and how many cached ones, from the first of each, are cuDNN's; 0 and 0 if not worth it."""
    num_keys = min(num_cached, _MAX_KEYS)
    octave = 1 << max(num_keys, 1).bit_length() - 1
    rows = _multiple(num_tokens, ROW_STEP)
    keys = _multiple(num_keys, max(KEY_STEP, octave // _KEY_LENGTHS_PER_OCTAVE))
    return (rows, keys) if rows and keys else (0, 0)


def pieces(num_rows: int) -> list[tuple[int, int]]:
    """The powers of two of rows, [start, stop), that attend over cached keys one after another."""
    spans, start = [], 0
    while start < num_rows:
        stop = start + (1 << (num_rows - start).bit_length() - 1)
        spans.append((start, stop))
        start = stop
    return spans


def attend(qkv: Tensor, kv: Tensor, spec: AttentionSpec, is_causal: bool) -> Partial:
    """Attention of all tokens of `qkv`, [num_tokens, spec.qkv_width], over all of `kv`.

    Args:
        kv: `KvRows.tokens`, with no room between heads.
        is_causal: `kv` has as many tokens, and each sees those before it and its own.
    """
    q, *_ = _split(qkv[:, : spec.out_width], spec.qk_dim, 1)
    keys, values = _split(kv, spec.qk_dim, 2)
    # The log-sum-exp is always asked for: with and without are two shapes to prepare, and it costs nothing.
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, keys, values, None, True, 0.0, is_causal, scale=spec.scale
    )
    return Partial(results[0][0].transpose(0, 1).contiguous(), results[1].view(spec.num_heads, -1))


def prepare(kv: Tensor, spec: AttentionSpec, max_tokens: int) -> None:
    """Run each shape that steps of up to `max_tokens` tokens and sequences of up to as many as `kv` has may need.

    Args:
        kv: any keys and values, as they are gathered.
    """
    qkv = kv.new_zeros((max_tokens, spec.qkv_width))
    cached = range(KEY_STEP, min(kv.shape[0], _MAX_KEYS) + 1, KEY_STEP)
    key_counts = sorted({part_over_cache(ROW_STEP, num_cached)[1] for num_cached in cached})
    for num_tokens in range(ROW_STEP, max_tokens + 1, ROW_STEP):
        rows = qkv[:num_tokens]
        attend(rows, rows[:, spec.out_width :], spec, is_causal=True)
        if num_tokens <= kv.shape[0]:
            attend(rows, kv[:num_tokens], spec, is_causal=True)
        if len(pieces(num_tokens)) == 1:
            for num_keys in key_counts:
                attend(rows, kv[:num_keys], spec, is_causal=False)


def _split(rows: Tensor, head_dim: int, num_parts: int) -> tuple[Tensor, ...]:
    """Heads of `rows` in equal parts, each [1, heads, num_tokens, head_dim].

    cuDNN prepares for strides, too: none of these depends on the number of tokens.
    """
    heads = rows.view(rows.shape[0], -1, head_dim).transpose(0, 1)
    return tuple(part[None] for part in heads.chunk(num_parts))


def _multiple(number: int, step: int) -> int:
    return number // step * step

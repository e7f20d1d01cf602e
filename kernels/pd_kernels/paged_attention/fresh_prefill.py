"""Attention of a prompt with nothing cached before it, on a GPU: torch's fused kernels over the packed tokens.

Such a prompt needs no cache: its keys and values are in the step. float32 and odd head sizes are left to Triton.

On an H200 cuDNN is twice as fast as flash attention, but prepares each new length for 26 ms, what it saves in 32 layers
of an 8192-token prompt. So it runs prompts padded to a few lengths (what stands after a token doesn't change it), and
flash attention runs the short ones, where they are equally fast. Measured by `benchmarks/attention.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

_LONG = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
_SHORT = [SDPBackend.FLASH_ATTENTION]
_LONG_TOKENS = 2048
# Lengths that cuDNN is run with between a power of two and the next: at most an eighth is padding.
_LENGTHS_PER_OCTAVE = 8
_MAX_HEAD_DIM = 256
_MIN_CAPABILITY = (8, 0)


def is_supported(pool: Tensor) -> bool:
    """Whether the fused kernels attend over keys and values of the pool's device, type and head size."""
    head_dim = pool.shape[-1]
    return (
        pool.is_cuda
        and pool.dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= _MAX_HEAD_DIM
        and torch.cuda.get_device_capability(pool.device) >= _MIN_CAPABILITY
    )


def attend(qkv: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """Causal attention of one prompt, [num_tokens, num_heads * head_dim].

    Args:
        qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim].
    """
    num_tokens = qkv.shape[0]
    is_long = num_tokens >= _LONG_TOKENS
    if is_long:
        qkv = functional.pad(qkv, (0, 0, 0, padded_tokens(num_tokens) - num_tokens))
    heads = qkv.view(1, qkv.shape[0], -1, head_dim).transpose(1, 2)
    q, (keys, values) = heads[:, :num_heads], heads[:, num_heads:].chunk(2, dim=1)
    with sdpa_kernel(_LONG if is_long else _SHORT, set_priority=True):
        out = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, enable_gqa=True)
    return out[:, :, :num_tokens].transpose(1, 2).reshape(num_tokens, -1)


def prepare(pool: Tensor, num_heads: int, max_tokens: int) -> None:
    """Run each length that `attend` will use for prompts of up to `max_tokens` tokens, so that none waits for it."""
    num_kv_heads, head_dim = pool.shape[3], pool.shape[5]
    width = (num_heads + 2 * num_kv_heads) * head_dim
    for num_tokens in sorted({padded_tokens(n) for n in range(_LONG_TOKENS, max_tokens + 1, 64)}):
        attend(pool.new_zeros((min(num_tokens, max_tokens), width)), num_heads, head_dim)


def padded_tokens(num_tokens: int) -> int:
    """The next of the few lengths that cuDNN prepares."""
    step = max(1, (1 << (num_tokens.bit_length() - 1)) // _LENGTHS_PER_OCTAVE)
    return -(-num_tokens // step) * step

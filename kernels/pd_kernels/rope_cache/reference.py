"""Rotary embedding and cache write in torch: the oracle of the Triton kernel, and what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_and_cache(
    qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int
) -> None:
    num_kv_heads, _, head_dim = pool.shape[3:]
    num_rotated = (num_heads + num_kv_heads) * head_dim
    rotated = qkv[:, :num_rotated].view(-1, num_heads + num_kv_heads, 2, head_dim // 2)
    first, second = rotated.unbind(2)
    cos, sin = cos[:, None], sin[:, None]
    x, y = first.float(), second.float()
    rotated_first, rotated_second = (x * cos).addcmul_(y, sin, value=-1), (y * cos).addcmul_(x, sin)
    first.copy_(rotated_first)
    second.copy_(rotated_second)
    write_cache(qkv, slots, pool, layer, num_heads)


def write_cache(qkv: Tensor, slots: Tensor, pool: Tensor, layer: int, num_heads: int) -> None:
    num_kv_heads, tokens_per_block, head_dim = pool.shape[3:]
    keys_and_values = qkv[:, num_heads * head_dim :].view(-1, 2, num_kv_heads, head_dim)
    written = slots >= 0
    slots = slots[written]
    new = keys_and_values[written]
    if pool.dtype == torch.float8_e4m3fn:
        limits = torch.finfo(pool.dtype)
        new = new.float().clamp(limits.min, limits.max).to(pool.dtype)
    pool[:, layer][slots // tokens_per_block, :, :, slots % tokens_per_block] = new

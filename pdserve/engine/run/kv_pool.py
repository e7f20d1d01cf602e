"""The memory of the paged KV cache: how many blocks fit, and the one tensor that holds them.

Owns the tensor for the life of the engine. Which block belongs to whom is the block manager's business.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
from torch import Tensor

from pd_kernels.kv_pack import pool_with_margins
from pdserve.config import KvCacheConfig
from pdserve.engine.models.config import ModelConfig
from pdserve.errors import ConfigError

log = logging.getLogger(__name__)

KV_FACTOR = 2  # keys and values
_DEFAULT_CPU_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class KvPool:
    """`tensor` is [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense.

    So a block is one piece of `block_bytes` bytes with all layers in it, and its share of a layer is one piece too.
    """

    tensor: Tensor

    @classmethod
    def allocate(
        cls, config: ModelConfig, tokens_per_block: int, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> KvPool:
        """A pool of `num_blocks` blocks for the layers and heads of `config`, filled with zeros. Around it are margins,
        by which a peer that maps its memory checks the mapping."""
        shape = (num_blocks, config.num_layers, KV_FACTOR, config.num_kv_heads, tokens_per_block, config.head_dim)
        # Zeros, not garbage: attention multiplies unwritten slots by weights of zero, and 0 * nan is nan.
        return cls(pool_with_margins(shape, dtype, device))

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[0]

    @property
    def tokens_per_block(self) -> int:
        return self.tensor.shape[4]

    @property
    def block_bytes(self) -> int:
        return self.tensor[0].numel() * self.tensor.element_size()


def fitting_blocks(
    config: ModelConfig,
    cache: KvCacheConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    reserve_bytes: int = 0,
    num_ranks: int = 1,
) -> int:
    """How many blocks for the layers and heads of `config` the device gets, as `cache` says.

    Args:
        reserve_bytes: device memory that must stay free for the activations of a step.
        num_ranks: how many share a CPU's memory.

    Raises:
        ConfigError: not one block fits, or nothing but `max_tokens` bounds the pool and asks for more memory than there
            is.
    """
    block_bytes = config.kv_bytes_per_token(dtype.itemsize) * cache.tokens_per_block
    free_bytes = max(0, _free_bytes(device) - reserve_bytes)
    key, budget_bytes = _budget(cache, device, free_bytes, num_ranks)
    fitting = budget_bytes // block_bytes
    wanted = None if cache.max_tokens is None else -(-cache.max_tokens // cache.tokens_per_block)
    if wanted is not None and wanted <= fitting:
        return wanted
    if key == "max_tokens":
        raise ConfigError(
            f"kv_cache_config.max_tokens: {cache.max_tokens} tokens do not fit; there is room for "
            f"{fitting * cache.tokens_per_block} on {device} beside weights and activations",
            "kv_cache_config.max_tokens",
        )
    if fitting < 1:
        raise ConfigError(
            f"kv_cache_config.{key}: {budget_bytes} bytes do not hold one block of {block_bytes} bytes",
            f"kv_cache_config.{key}",
        )
    if wanted is not None:
        tokens = fitting * cache.tokens_per_block
        log.warning("kv_cache_config.%s has room for %d tokens, of max_tokens %d", key, tokens, cache.max_tokens)
    return fitting


def _budget(cache: KvCacheConfig, device: torch.device, free_bytes: int, num_ranks: int) -> tuple[str, int]:
    """How many bytes a rank's pool may take at most, and which key of `cache` says so."""
    if device.type == "cuda":
        return "free_gpu_memory_fraction", int(free_bytes * cache.free_gpu_memory_fraction)
    if cache.cpu_memory_bytes is None and cache.max_tokens is not None:
        return "max_tokens", free_bytes
    return "cpu_memory_bytes", (cache.cpu_memory_bytes or _DEFAULT_CPU_BYTES) // num_ranks


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)

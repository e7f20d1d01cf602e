"""The memory of the paged KV cache: how many blocks of each cache group fit, and the tensor that holds them.

Owns the tensors for the life of the engine. Which block belongs to whom is the block manager's business.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch
from torch import Tensor

from pd_kernels.kv_pack import pool_with_margins
from pdserve.config import KvCacheConfig, LlmArgs
from pdserve.engine.cache_spec import CacheShare
from pdserve.errors import ConfigError

log = logging.getLogger(__name__)

KV_FACTOR = 2  # keys and values
_DEFAULT_CPU_BYTES = 1 << 30
_ANY_NUMBER = 1 << 60  # of blocks, where a rank has no layer whose pool grows with it


@dataclass(frozen=True, slots=True)
class KvPool:
    """`tensor` is [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], dense, of a `share`.

    So a block is one piece of `block_bytes` bytes with all layers in it, and its share of a layer is one piece too.
    """

    tensor: Tensor
    share: CacheShare

    @classmethod
    def allocate(
        cls, share: CacheShare, tokens_per_block: int, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> KvPool:
        """A pool of `num_blocks` blocks, filled with zeros. Around it are margins, by which a peer that maps its memory
        checks the mapping."""
        shape = (num_blocks, *_block_shape(share, tokens_per_block))
        # Zeros, not garbage: attention multiplies unwritten slots by weights of zero, and 0 * nan is nan.
        return cls(pool_with_margins(shape, dtype, device), share)

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[0]

    @property
    def tokens_per_block(self) -> int:
        return self.tensor.shape[4]

    @property
    def block_bytes(self) -> int:
        return self.tensor[0].numel() * self.tensor.element_size()


@dataclass(frozen=True, slots=True)
class Demand:
    """How large the pool of one cache group may become: `share` of it is the rank's, and no more than `most_blocks` can
    be in use at one time; None: any number."""

    share: CacheShare
    most_blocks: int | None = None

    @classmethod
    def of(cls, share: CacheShare, args: LlmArgs, max_seq_len: int) -> Demand:
        """Each sequence keeps its window; what a step leaves behind of it is free after the step. But one that starts
        takes blocks for all of its tokens, and the longest must find them."""
        window, width = share.group.spec.window, args.kv_cache_config.tokens_per_block
        if window is None:
            return cls(share)
        kept_blocks = args.max_batch_size * (-(-(window + args.max_num_tokens) // width) + 1)
        return cls(share, max(kept_blocks, -(-max_seq_len // width)))

    def num_blocks(self, num_full_blocks: int) -> int:
        """How many blocks this group gets where one without a window has `num_full_blocks`."""
        return num_full_blocks if self.most_blocks is None else min(self.most_blocks, num_full_blocks)


def fitting_blocks(
    demands: Sequence[Demand],
    cache: KvCacheConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    reserve_bytes: int = 0,
    num_ranks: int = 1,
) -> int:
    """How many blocks a cache group without a window gets on the device, as `cache` says; see `Demand.num_blocks`.

    Args:
        demands: of all cache groups.
        reserve_bytes: device memory that must stay free for the activations of a step.
        num_ranks: how many share a CPU's memory.

    Raises:
        ConfigError: not one block fits, or nothing but `max_tokens` bounds the pools and asks for more memory than
            there is.
    """
    width = cache.tokens_per_block
    free_bytes = max(0, _free_bytes(device) - reserve_bytes)
    key, budget_bytes = _budget(cache, device, free_bytes, num_ranks)
    sizes = [math.prod(_block_shape(each.share, width)) * dtype.itemsize for each in demands]
    fitting = _fill_up(budget_bytes, sizes, [each.most_blocks for each in demands])
    wanted = None if cache.max_tokens is None else -(-cache.max_tokens // width)
    if wanted is not None and wanted <= fitting:
        return wanted
    if key == "max_tokens":
        raise ConfigError(
            f"kv_cache_config.max_tokens: {cache.max_tokens} tokens do not fit; there is room for "
            f"{fitting * width} on {device} beside weights and activations",
            "kv_cache_config.max_tokens",
        )
    if fitting < 1:
        raise ConfigError(
            f"kv_cache_config.{key}: {budget_bytes} bytes do not hold one block of {sum(sizes)} bytes",
            f"kv_cache_config.{key}",
        )
    if wanted is not None:
        log.warning(
            "kv_cache_config.%s has room for %d tokens, of max_tokens %d", key, fitting * width, cache.max_tokens
        )
    return fitting


def _fill_up(budget_bytes: int, sizes: Sequence[int], most_blocks: Sequence[int | None]) -> int:
    """The most blocks a group that may have any number gets, while the others get as many, up to their own most.

    Args:
        sizes: bytes of a block, a group each.
    """
    growing = sum(sizes)
    fitting = budget_bytes // growing
    for most, block_bytes in sorted((most, size) for most, size in zip(most_blocks, sizes, strict=True) if most):
        if most >= fitting:
            break
        budget_bytes, growing = budget_bytes - most * block_bytes, growing - block_bytes
        fitting = budget_bytes // growing if growing else _ANY_NUMBER
    return fitting


def _block_shape(share: CacheShare, tokens_per_block: int) -> tuple[int, ...]:
    return len(share.layers), KV_FACTOR, len(share.heads), tokens_per_block, share.group.spec.head_dim


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

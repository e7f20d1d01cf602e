"""Carries out the copies of whole blocks that come before a step. Every rank has one and is given the same copies.

Owns the host's blocks: pinned memory beside each cache group's pool, of the same shape, for the life of the engine. All
copies are enqueued on the current stream, so they are made in order, after the steps before and before the step that
follows.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.errors import ConfigError


class BlockCopier:
    """`pools` are the device's blocks, [num_blocks, ...] a cache group, dense.

    Raises:
        ConfigError: there is no memory for `num_host_blocks` blocks of each group.
    """

    def __init__(self, pools: Sequence[Tensor], num_host_blocks: int) -> None:
        self._pools = pools
        self._hosts = [_host_blocks(pool, num_host_blocks) for pool in pools]

    def run(self, copies: Sequence[BlockCopy]) -> None:
        """Enqueue `copies`, one after the other."""
        for copy in copies:
            pool, host = self._pools[copy.group], self._hosts[copy.group]
            source = host if copy.kind == "onboard" else pool
            target = host if copy.kind == "offload" else pool
            target[copy.target].copy_(source[copy.source], non_blocking=True)


def _host_blocks(pool: Tensor, num_blocks: int) -> Tensor:
    try:
        blocks = torch.empty((num_blocks, *pool.shape[1:]), dtype=pool.dtype)
    except RuntimeError as error:
        raise ConfigError(
            f"kv_cache_config.host_cache_size: no memory for {num_blocks} blocks on the host: {error}",
            "kv_cache_config.host_cache_size",
        ) from None
    if pool.is_cuda and num_blocks:
        _pin(blocks)
    return blocks


def _pin(blocks: Tensor) -> None:
    """Make copies to and from `blocks` asynchronous. (Asked for at allocation, torch takes the next power of two.)"""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = blocks.data_ptr()
    status = runtime.cudaHostRegister(address, blocks.numel() * blocks.element_size(), 0)
    if int(status):
        raise ConfigError(
            f"kv_cache_config.host_cache_size: the host's memory could not be pinned (CUDA error {int(status)})",
            "kv_cache_config.host_cache_size",
        )
    weakref.finalize(blocks, runtime.cudaHostUnregister, address).atexit = False

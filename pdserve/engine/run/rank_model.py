"""One rank's share of a model, loaded and ready to run steps: the same on rank 0 and on its followers.

Owns the parameters, the KV pool and the device they live on. Life: the constructor loads the weights and says in
`num_blocks_that_fit` what cache there is room for; `make_pool` takes the number that all ranks have agreed on.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from pdserve.config import LlmArgs
from pdserve.engine.models import weights
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.models.group import Group
from pdserve.engine.models.mapping import Shard
from pdserve.engine.models.parameters import Parameters, allocate, num_bytes
from pdserve.engine.run.kv_pool import KvPool, fitting_blocks
from pdserve.engine.run.resources import activation_bytes, choose_attention, choose_dtype, choose_kv_dtype
from pdserve.errors import ConfigError
from pdserve.model_store import read_config

log = logging.getLogger(__name__)

_GIB = float(1 << 30)


class RankModel:
    """The share of `group`'s rank.

    Args:
        folder: the resolved model.

    Raises:
        ConfigError: the model, its files or the arguments can't be served; `param` names the key.
    """

    def __init__(self, args: LlmArgs, folder: Path, device: torch.device, group: Group) -> None:
        self.device = device
        self.config = ModelConfig.from_hf(read_config(folder))
        self.dtype = choose_dtype(args, self.config, device)
        self.kv_dtype = choose_kv_dtype(args, self.dtype)
        self._args = args
        self._group = group
        self.shard = Shard.of(self.config, group.mapping)
        parameters = self._load(folder)
        self._weight_bytes = num_bytes(self.shard, parameters)
        self.decoder = Decoder(self.shard.config, parameters, choose_attention(args, device), group)
        self.num_blocks_that_fit = fitting_blocks(
            self.shard.config,
            args.kv_cache_config,
            self.kv_dtype,
            device,
            reserve_bytes=activation_bytes(args, self.shard, self.dtype, device),
            num_ranks=group.mapping.world_size,
        )

    def make_pool(self, num_blocks: int) -> KvPool:
        """The rank's KV pool. Raises ConfigError if other ranks' blocks don't fit here after all."""
        cache, mapping = self._args.kv_cache_config, self._group.mapping
        try:
            pool = KvPool.allocate(self.shard.config, cache.tokens_per_block, num_blocks, self.kv_dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"kv_cache_config: {num_blocks} blocks do not fit: {error}", "kv_cache_config") from None
        takes_a_fraction = self.device.type == "cuda" and cache.max_tokens is None
        fraction = f", {cache.free_gpu_memory_fraction:g} of what was free" if takes_a_fraction else ""
        log.info(
            "%s: %s on %s%s; weights %.2f GiB; KV cache of %d tokens in %d blocks, %.2f GiB%s",
            self._args.model,
            str(self.dtype).removeprefix("torch."),
            self.device,
            f" (rank {mapping.rank} of {mapping.world_size})" if mapping.world_size > 1 else "",
            self._weight_bytes / _GIB,
            num_blocks * pool.tokens_per_block,
            num_blocks,
            num_blocks * pool.block_bytes / _GIB,
            fraction,
        )
        return pool

    def _load(self, folder: Path) -> Parameters:
        try:
            parameters = allocate(self.shard, self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"model: the weights do not fit on {self.device}: {error}", "model") from None
        if self._args.load_format == "DUMMY":
            weights.fill_randomly(self.shard, parameters)
        else:
            weights.load(folder, self.shard, parameters)
        return parameters

"""One rank's share of a model, loaded and ready to run steps: the same on rank 0 and on its followers.

Owns the model and the device it lives on. Life: the constructor loads the weights and says in `num_blocks_that_fit`
what cache there is room for; `make_pools` takes the number that all ranks have agreed on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from pdserve.config import LlmArgs
from pdserve.engine.layers.builder import Builder
from pdserve.engine.models import weights
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.models.registry import describe
from pdserve.engine.parallel.group import Group
from pdserve.engine.run.kv_pool import Demand, KvPool, fitting_blocks
from pdserve.engine.run.resources import (
    activation_bytes,
    choose_attention,
    choose_dtype,
    choose_kv_dtype,
    choose_max_seq_len,
)
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
        self.mapping = group.mapping
        self.config = describe(read_config(folder))
        self.dtype = choose_dtype(args, self.config, device)
        self.kv_dtype = choose_kv_dtype(args, self.dtype)
        self._args = args
        self._build = Builder(self.dtype, device, group, choose_attention(args, device))
        self.decoder = self._load(folder)
        max_seq_len = choose_max_seq_len(args, self.config)
        self._demands = [Demand.of(share, args, max_seq_len) for share in self.decoder.cache_shares()]
        self.num_blocks_that_fit = fitting_blocks(
            self._demands,
            args.kv_cache_config,
            self.kv_dtype,
            device,
            reserve_bytes=activation_bytes(args, self.decoder, self.config),
            num_ranks=self.mapping.world_size,
        )

    def make_pools(self, num_blocks: int) -> list[KvPool]:
        """The rank's KV pools, one for each cache group, for `num_blocks` blocks of a group without a window.

        Raises:
            ConfigError: other ranks' blocks don't fit here after all.
        """
        width = self._args.kv_cache_config.tokens_per_block
        try:
            pools = [
                KvPool.allocate(each.share, width, each.num_blocks(num_blocks), self.kv_dtype, self.device)
                for each in self._demands
            ]
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"kv_cache_config: {num_blocks} blocks do not fit: {error}", "kv_cache_config") from None
        self._say_what_is_loaded(pools)
        return pools

    def _load(self, folder: Path) -> Decoder:
        try:
            decoder = self.config.build(self._build)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"model: the weights do not fit on {self.device}: {error}", "model") from None
        if self._args.load_format == "DUMMY":
            weights.fill_randomly(self._build)
        else:
            weights.load(folder, self._build)
        self._weight_bytes = self._build.num_bytes
        self._build.finish()
        return decoder

    def _say_what_is_loaded(self, pools: Sequence[KvPool]) -> None:
        cache, mapping = self._args.kv_cache_config, self.mapping
        takes_a_fraction = self.device.type == "cuda" and cache.max_tokens is None
        log.info(
            "%s: %s on %s%s; weights %.2f GiB; KV cache of %d tokens in %s blocks, %.2f GiB%s",
            self._args.model,
            str(self.dtype).removeprefix("torch."),
            self.device,
            f" (rank {mapping.rank} of {mapping.world_size})" if mapping.world_size > 1 else "",
            self._weight_bytes / _GIB,
            max(pool.num_blocks for pool in pools) * cache.tokens_per_block,
            " + ".join(str(pool.num_blocks) for pool in pools),
            sum(pool.tensor.nbytes for pool in pools) / _GIB,
            f", {cache.free_gpu_memory_fraction:g} of what was free" if takes_a_fraction else "",
        )

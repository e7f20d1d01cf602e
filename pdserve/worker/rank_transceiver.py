"""Joins a transceiver to one rank of a worker's engine: on rank 0, which serves the engine, and on its followers.

Owns the description of the rank's cache that peers compare, and what one rank must know of the worker to take part.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec

from kv_transfer.environment import Post
from kv_transfer.layout import KvLayout, KvPoolView, Span
from kv_transfer.ranks.place import place
from kv_transfer.transceiver import Failed, Transceiver
from pdserve.config import LlmArgs
from pdserve.engine.run.kv_pool import KV_FACTOR, KvPool
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.step_executor import StepExecutor
from pdserve.errors import ConfigError
from pdserve.model_fingerprint import model_fingerprint
from pdserve.model_store import read_config, resolve_model
from pdserve.protocol import Role


class TransceiverSpec(msgspec.Struct, frozen=True):
    """What all ranks of a worker must agree on. `host` is the address that they listen at, `dial_host` the one that
    others reach them at."""

    role: Role
    worker_id: str
    host: str
    dial_host: str


def join_transceiver(
    spec: TransceiverSpec, args: LlmArgs, rank: RankModel, pool: KvPool, executor: StepExecutor,
    folder: Path | None, post: Post, on_failure: Failed,
) -> Transceiver:  # fmt: skip
    """A transceiver over the rank's pool, not started yet, that counts the steps which `executor` launches from now on.

    Args:
        folder: known to the worker's ranks alone; None if there is one.
        post: gets the events of the worker's handoffs, on rank 0.
        on_failure: see `Transceiver`.
    """
    mapping = rank.shard.mapping
    transceiver = Transceiver(
        KvPoolView(pool.tensor, kv_layout(args, rank, pool)),
        args.cache_transceiver_config,
        worker_id=spec.worker_id,
        host=spec.host,
        dial_host=spec.dial_host,
        role=spec.role,
        post=post,
        on_failure=on_failure,
        ranks=place(folder or Path(), mapping.rank, mapping.world_size),
    )
    executor.on_launched = transceiver.steps.launched
    return transceiver


def kv_layout(args: LlmArgs, rank: RankModel, pool: KvPool) -> KvLayout:
    """What two workers compare before they exchange KV: whose it is, its shape, and this rank's part of it."""
    shard, whole = rank.shard, rank.shard.whole
    return KvLayout(
        model=_shape(args),
        weights=fingerprint(args),
        num_layers=whole.num_layers,
        kv_factor=KV_FACTOR,
        num_kv_heads=whole.num_kv_heads,
        tokens_per_block=pool.tokens_per_block,
        head_dim=whole.head_dim,
        dtype=str(pool.tensor.dtype).removeprefix("torch."),
        layers=Span(shard.layers.start, shard.layers.stop),
        kv_heads=Span(shard.kv_heads.start, shard.kv_heads.stop),
    )


def _shape(args: LlmArgs) -> str:
    """The model's configuration and the size of its files; what workers go by that do not tell their `weights`."""
    folder = resolve_model(args.model)
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    told = json.dumps([read_config(folder), args.load_format, sizes], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def fingerprint(args: LlmArgs) -> str:
    """Which model a worker with `args` serves (`pdserve.model_fingerprint`).

    Raises:
        ConfigError: the folder holds no weights, or a file can't be read.
    """
    found = model_fingerprint(resolve_model(args.model), args.load_format)
    if found is None:
        raise ConfigError(f"model: {args.model} holds no weights", "model")
    return found

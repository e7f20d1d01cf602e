"""Attaches a transceiver, with the halves of its worker's role, to one rank of the engine: rank 0 or a follower.

`roles.main` calls it on rank 0, `roles.follower` on the others. Owns the description of the rank's cache that peers
compare, and what a rank must know of its worker to take part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from context_worker.exporter import Exporter
from context_worker.handoffs import Exports
from generation_worker.handoffs import Imports
from generation_worker.importer import Importer
from kv_transfer.environment import Post
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView, Span
from kv_transfer.options import TransceiverOptions
from kv_transfer.ranks.place import place
from kv_transfer.transceiver import Failed, Transceiver
from pdserve.config import LlmArgs
from pdserve.engine.run.kv_pool import KV_FACTOR, KvPool
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.step_executor import StepExecutor
from pdserve.errors import ConfigError
from pdserve.model_fingerprint import model_fingerprint
from pdserve.model_store import read_config, resolve_model
from pdserve.protocol import Phase


class TransceiverSpec(msgspec.Struct, frozen=True):
    """What all ranks of a worker must agree on.

    Attributes:
        role: a "context" worker sends, a "generation" worker receives, one of "both" does both.
        worker_id: the worker's.
        host: the address that its transceivers listen at.
        dial_host: the address at which peers reach them.
    """

    role: Phase
    worker_id: str
    host: str
    dial_host: str


@dataclass(frozen=True)
class KvTransfer:
    """A transceiver, and what its role gives the engine to send and to receive with."""

    transceiver: Transceiver
    exporter: Exporter | None
    importer: Importer | None


def attach_transceiver(
    spec: TransceiverSpec, args: LlmArgs, rank: RankModel, pools: Sequence[KvPool], executor: StepExecutor,
    folder: Path | None, post: Post, on_failure: Failed,
) -> KvTransfer:  # fmt: skip
    """Make a transceiver over the rank's pools. It is not started yet. `executor` tells it of each step from now on.

    Args:
        folder: a folder that only the worker's ranks know; None if it has one rank.
        post: gets the events of the worker's handoffs, on rank 0.
        on_failure: see `Transceiver`.
    """
    mapping, sends, receives = rank.mapping, spec.role != "generation", spec.role != "context"
    transceiver = Transceiver(
        KvPoolView([pool.tensor for pool in pools], kv_layout(args, pools)),
        args.cache_transceiver_config,
        TransceiverOptions(spec.worker_id, spec.host, spec.dial_host),
        post,
        exports=Exports() if sends else None,
        imports=Imports() if receives else None,
        ranks=place(folder or Path(), mapping.rank, mapping.world_size),
        on_failure=on_failure,
    )
    executor.on_launched = transceiver.steps.launched
    return KvTransfer(
        transceiver, Exporter(transceiver) if sends else None, Importer(transceiver) if receives else None
    )


def kv_layout(args: LlmArgs, pools: Sequence[KvPool]) -> KvLayout:
    """What two workers compare before they exchange KV: whose it is, its shape, and this rank's part of it."""
    return KvLayout(model=_shape(args), weights=fingerprint(args), groups=tuple(_group_layout(pool) for pool in pools))


def _group_layout(pool: KvPool) -> GroupLayout:
    share, group = pool.share, pool.share.group
    return GroupLayout(
        kind=group.spec.kind,
        window=group.spec.window or 0,
        layer_ids=group.layers,
        num_layers=len(group.layers),
        kv_factor=KV_FACTOR,
        num_kv_heads=group.spec.num_heads,
        tokens_per_block=pool.tokens_per_block,
        head_dim=group.spec.head_dim,
        dtype=str(pool.tensor.dtype).removeprefix("torch."),
        layers=Span(share.layers.start, share.layers.stop) if share.layers else Span(0, 0),
        kv_heads=Span(share.heads.start, share.heads.stop),
    )


def _shape(args: LlmArgs) -> str:
    """A hash of the model's configuration and of the sizes of its files: what peers compare if one of them does not
    tell the fingerprint of its weights."""
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

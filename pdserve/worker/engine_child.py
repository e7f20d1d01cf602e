"""The engine's process: model, transceiver and engine put together for one role, and run until told to stop.

This is the one place where engine and transceiver meet. A `ConfigError` or any other failure while starting is the
process's last message to its server (`EngineFailed`), which says it in the worker's log and exit status.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from kv_transfer.layout import KvLayout, KvPoolView
from kv_transfer.transceiver import Transceiver
from pdserve.config import LlmArgs
from pdserve.engine.engine import Engine
from pdserve.engine.model_runner import ModelRunner
from pdserve.engine.options import EngineOptions
from pdserve.engine.process import EngineProcess, EngineService, end_now
from pdserve.errors import ConfigError
from pdserve.model_store import read_config, resolve_model
from pdserve.process import configure_logging
from pdserve.protocol import EngineReady, EngineStats
from pdserve.worker.engine_link import EngineSpec

log = logging.getLogger(__name__)

Ends = Callable[[Transceiver], dict[str, Any]]


def run_engine(ends: Ends) -> int:
    """Read the `EngineSpec` on standard input and serve it; returns the exit status.

    Args:
        ends: picks the end of the transceiver that this role's `Engine` gets, as its keyword arguments.
    """
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSpec)
    configure_logging(spec.log_level)
    args = LlmArgs.model_validate(spec.args)
    return EngineProcess(lambda wake: _start(spec, args, ends, wake), spec.to_engine, spec.from_engine).run()


def _start(spec: EngineSpec, args: LlmArgs, ends: Ends, wake: Callable[[], None]) -> EngineService:
    started_s = time.monotonic()
    refuse_ranks(args)
    runner = ModelRunner(
        args, decodes=spec.role != "context", on_rank_lost=lambda error: end_now(error, spec.from_engine)
    )
    runner.warmup()
    transceiver = Transceiver(
        KvPoolView(runner.pool.tensor, kv_layout(runner, args)),
        args.cache_transceiver_config,
        worker_id=spec.worker_id,
        host=spec.kv_host,
        role=spec.role,
        post=lambda event: engine.post(event),
    )
    engine = Engine(runner, EngineOptions.from_args(args), wake=wake, **ends(transceiver))
    address = transceiver.start()
    log.info("warm after %.1f s", time.monotonic() - started_s)
    ready = EngineReady(
        limits=runner.limits,
        dtype=str(runner.dtype).removeprefix("torch."),
        device=_describe(runner.device),
        kv=address,
        pid=os.getpid(),
    )

    def close() -> None:
        transceiver.close()
        runner.close()

    return EngineService(engine, ready, lambda stats: _with_transfers(stats, transceiver), close)


def refuse_ranks(args: LlmArgs) -> None:
    """Raise ConfigError if `args` ask for several ranks: a transceiver moves the KV of one."""
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(args, key) > 1:
            raise ConfigError(f"{key}: workers that exchange KV have one rank each; allowed: 1", key)


def _with_transfers(stats: EngineStats, transceiver: Transceiver) -> EngineStats:
    return msgspec.structs.replace(
        stats,
        staging_bytes=transceiver.staging_bytes,
        staging_in_use_bytes=transceiver.staging_in_use_bytes,
        transfers=transceiver.counts(),
    )


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def kv_layout(runner: ModelRunner, args: LlmArgs) -> KvLayout:
    """What two workers compare before they exchange KV: the pool's shape, and whose KV it is."""
    blocks = runner.pool.tensor
    return KvLayout(
        model=_fingerprint(args),
        num_layers=blocks.shape[1],
        kv_factor=blocks.shape[2],
        num_kv_heads=blocks.shape[3],
        tokens_per_block=blocks.shape[4],
        head_dim=blocks.shape[5],
        dtype=str(blocks.dtype).removeprefix("torch."),
    )


def _fingerprint(args: LlmArgs) -> str:
    """The model by its configuration and the size of its weights, so that its path may differ between hosts."""
    folder = resolve_model(args.model)
    sizes = sorted((file.name, file.stat().st_size) for file in folder.glob("*.safetensors"))
    told = json.dumps([read_config(folder), args.load_format, sizes], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]

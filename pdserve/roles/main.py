"""The engine's process of any worker: model, transceiver and engine put together, and run until told to stop.

Run with `python -m`, it is told on standard input what to do, its role among that. A `ConfigError` or any other failure
while starting is the process's last message to its server (`EngineFailed`), which says it in the worker's log and exit
status.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import msgspec
import torch

from kv_transfer.transceiver import Transceiver
from pdserve.config import LlmArgs
from pdserve.engine.hosts.process import EngineProcess, EngineService, end_now
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.ranks.ranks import FollowerProgram
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.errors import PdserveError
from pdserve.process import allow_all_descriptors, configure_logging, freeze_startup_objects, share_interpreter_fairly
from pdserve.protocol import EngineReady, EngineStats
from pdserve.roles.kv_transfer import TransceiverSpec, attach_transceiver, fingerprint
from pdserve.worker.engine_link import EngineSpec

log = logging.getLogger(__name__)


def run_engine() -> int:
    """Read the `EngineSpec` on standard input and serve it; returns the exit status."""
    share_interpreter_fairly()
    allow_all_descriptors()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSpec)
    configure_logging(spec.log_level)
    args = LlmArgs.model_validate(spec.args)
    addresses = spec.to_engine, spec.from_engine
    return EngineProcess(lambda wake: _start(spec, args, wake), *addresses, args.hang_detection_timeout).run()


def _start(spec: EngineSpec, args: LlmArgs, wake: Callable[[], None]) -> EngineService:
    started_s = time.monotonic()
    shared = TransceiverSpec(spec.role, spec.worker_id, spec.kv_host, spec.kv_dial_host)

    def end(error: PdserveError) -> None:
        end_now(error, spec.from_engine)

    runner = ModelRunner(
        args,
        decodes=spec.role != "context",
        followers=FollowerProgram("pdserve.roles.follower", msgspec.json.encode(shared).decode()),
        on_rank_lost=end,
    )
    # Before the first step: the ranks' transceivers count them.
    attached = attach_transceiver(
        shared, args, runner.rank, runner.pools, runner.executor, runner.ranks_folder,
        lambda event: engine.post(event), on_failure=end,
    )  # fmt: skip
    runner.warmup()
    options = EngineOptions.from_args(args)
    engine = Engine(runner, options, wake=wake, exporter=attached.exporter, importer=attached.importer)
    transceiver = attached.transceiver
    address = transceiver.start()
    log.info("warm after %.1f s", time.monotonic() - started_s)
    ready = EngineReady(
        limits=runner.limits,
        dtype=str(runner.dtype).removeprefix("torch."),
        device=_describe(runner.device),
        kv=address,
        pid=os.getpid(),
        model_fingerprint=fingerprint(args),
    )

    def close() -> None:
        transceiver.close()
        runner.close()

    freeze_startup_objects()
    complete = partial(_with_transfers, transceiver)
    return EngineService(engine, ready, complete, runner.are_ranks_alive, close)


def _with_transfers(transceiver: Transceiver, stats: EngineStats) -> EngineStats:
    return msgspec.structs.replace(
        stats,
        staging_bytes=transceiver.staging_bytes,
        staging_in_use_bytes=transceiver.staging_in_use_bytes,
        transfers=transceiver.counts(),
        kv_hindrance=transceiver.hindrance,
    )


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(run_engine())

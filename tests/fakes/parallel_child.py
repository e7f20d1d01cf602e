"""A real engine process over a tiny model on two ranks: `python -m tests.fakes.parallel_child MODEL TO FROM`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pdserve.config import KvCacheConfig, LlmArgs
from pdserve.engine.hosts.process import EngineProcess, EngineService, end_now
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.engine import Engine
from pdserve.protocol import EngineReady

MODEL, TO_ENGINE, FROM_ENGINE = sys.argv[1:]


def start(wake: Callable[[], None]) -> EngineService:
    args = LlmArgs(
        model=MODEL,
        device="cpu",
        num_threads=1,
        tensor_parallel_size=2,
        max_batch_size=4,
        kv_cache_config=KvCacheConfig(max_tokens=1024),
    )
    runner = ModelRunner(args, on_rank_lost=lambda error: end_now(error, FROM_ENGINE))
    engine = Engine(runner, wake=wake)
    ready = EngineReady(limits=runner.limits, dtype="float32", device="cpu", pid=os.getpid())
    return EngineService(engine, ready, are_ranks_alive=runner.are_ranks_alive, close=runner.close)


if __name__ == "__main__":
    sys.exit(EngineProcess(start, TO_ENGINE, FROM_ENGINE).run())

"""An engine process without a model: `python -m benchmarks.paced_engine`, with an `EngineSpec` on standard input.

Scheduler, blocks, messages and pipes are the real ones; a step takes `STEP_VARIABLE` milliseconds, most of it asleep,
as a host does that waits for its GPU. The tokens mean nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

import msgspec

from pdserve.config import LlmArgs
from pdserve.engine.hosts.process import EngineProcess, EngineService
from pdserve.engine.schedule.batch import BatchItem, BatchResult, BlockCopy
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.handoff import KvExporter
from pdserve.process import configure_logging, freeze_startup_objects
from pdserve.protocol import EngineLimits, EngineReady
from pdserve.worker.engine_link import EngineSpec

STEP_VARIABLE = "BENCH_STEP_MS"
VOCAB_SIZE = 49_152


class PacedStep:
    def __init__(self, items: Sequence[BatchItem], ready_s: float) -> None:
        self._tokens = [[(item.start * 7919 + 300) % VOCAB_SIZE] if item.num_sampled else [] for item in items]
        self._ready_s = ready_s

    def results(self) -> list[BatchResult]:
        time.sleep(max(0.0, self._ready_s - time.monotonic()))
        return [BatchResult(token_ids) for token_ids in self._tokens]


class PacedRunner:
    """Implements `Runner`: one step after the other, `step_s` each."""

    def __init__(self, limits: EngineLimits, step_s: float) -> None:
        self.limits = limits
        self.is_asynchronous = True
        self.num_host_blocks = 0
        self.exporter: KvExporter | None = None
        self._step_s = step_s
        self._free_s = 0.0

    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> PacedStep:
        self._free_s = max(self._free_s, time.monotonic()) + self._step_s
        return PacedStep(items, self._free_s)

    def probe(self) -> None:
        """Every step succeeds."""

    def close(self) -> None:
        """Nothing to end."""


def main() -> int:
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineSpec)
    configure_logging(spec.log_level)
    args = LlmArgs.model_validate(spec.args)
    limits = EngineLimits(
        max_seq_len=8192,
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        vocab_size=VOCAB_SIZE,
        num_blocks=1 << 16,
        tokens_per_block=32,
    )

    def start(wake: Callable[[], None]) -> EngineService:
        runner = PacedRunner(limits, float(os.environ[STEP_VARIABLE]) / 1000)
        engine = Engine(runner, EngineOptions.from_args(args), wake=wake)
        freeze_startup_objects()
        return EngineService(engine, EngineReady(limits=limits, dtype="none", device="none", pid=os.getpid()))

    return EngineProcess(start, spec.to_engine, spec.from_engine).run()


if __name__ == "__main__":
    sys.exit(main())

"""A real engine process over a fake model: `python -m tests.fakes.engine_child TO_ENGINE FROM_ENGINE [HANG_TIMEOUT_S]`.

The step that computes the prompt `HANGS` never ends.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence

from pdserve.engine.hosts.process import EngineProcess, EngineService
from pdserve.engine.schedule.batch import BatchItem, BlockCopy
from pdserve.engine.schedule.engine import Engine
from pdserve.protocol import EngineReady
from tests.fakes.fake_runner import FakeRunner, _FakeStep

HANGS = [7, 7, 7]


class HangingRunner(FakeRunner):
    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> _FakeStep:
        while any(list(item.token_ids) == HANGS for item in items):
            time.sleep(1.0)
        return super().launch(items, copies)


def start(wake: Callable[[], None]) -> EngineService:
    engine = Engine(HangingRunner(), wake=wake)
    return EngineService(engine, EngineReady(limits=engine.limits, dtype="none", device="none", pid=os.getpid()))


if __name__ == "__main__":
    timeout_s = float(sys.argv[3]) if len(sys.argv) > 3 else None
    sys.exit(EngineProcess(start, sys.argv[1], sys.argv[2], timeout_s).run())

"""A real engine process over a fake model: `python -m tests.fakes.engine_child TO_ENGINE FROM_ENGINE`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pdserve.engine.engine import Engine
from pdserve.engine.process import EngineProcess, EngineService
from pdserve.protocol import EngineReady
from tests.fakes.fake_runner import FakeRunner


def start(wake: Callable[[], None]) -> EngineService:
    engine = Engine(FakeRunner(), wake=wake)
    return EngineService(engine, EngineReady(limits=engine.limits, dtype="none", device="none", pid=os.getpid()))


if __name__ == "__main__":
    sys.exit(EngineProcess(start, sys.argv[1], sys.argv[2]).run())

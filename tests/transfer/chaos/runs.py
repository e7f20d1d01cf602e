"""Worlds of every kind by their number, in several processes, until enough faults were injected."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import count

import torch

from pdserve.progress import Progress
from tests.transfer.chaos.engines import EngineWorld
from tests.transfer.chaos.processes import ProcessWorld
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.world import run_world as run_transceivers

log = logging.getLogger(__name__)

ROUNDS = 6
STUCK_S = 150
"""A world that takes longer hangs: its process shows where, and ends."""


def kind_of(number: int) -> str:
    """Most worlds are of transceivers alone; processes take long to start."""
    return {2: "engines", 5: "processes", 8: "engines"}.get(number % 12, "transceivers")


def run_world(seed: int, number: int) -> Tally:
    """World `number` of `seed`, of the kind that it is."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # everything that goes wrong here is meant to
    faulthandler.dump_traceback_later(STUCK_S, exit=True)
    tally, kind = Tally(), kind_of(number)
    if kind == "engines":
        EngineWorld(seed, number).run(tally, ROUNDS)
    elif kind == "processes":
        world = ProcessWorld(seed, number, "context" if number % 24 < 12 else "generation")
        world.run(tally, world.draw(ROUNDS))
    else:
        run_transceivers(seed, number, tally, ROUNDS)
    faulthandler.cancel_dump_traceback_later()
    tally.totals[f"worlds of {kind}"] += 1
    return tally


def run_worlds(seed: int, num_faults: int, jobs: int, limit_s: float, total: Tally) -> list[str]:
    """Add to `total` until it has `num_faults` or the time is up; returns what went wrong."""
    began_s, numbers, failures = time.monotonic(), count(), []
    running: dict[Future[Tally], int] = {}
    with (
        ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool,
        Progress(log, "injecting", num_faults, "faults") as progress,
    ):
        while total.num_faults < num_faults and time.monotonic() - began_s < limit_s and not failures:
            while len(running) < jobs:
                number = next(numbers)
                running[pool.submit(run_world, seed, number)] = number
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            before = total.num_faults
            for future in done:
                failures += _take(future, running.pop(future), total)
            progress.advance(total.num_faults - before)
        for future, number in running.items():
            failures += _take(future, number, total)
    return failures


def _take(future: Future[Tally], number: int, total: Tally) -> list[str]:
    try:
        total.add(future.result())
    except Exception as error:
        return [f"world {number} ({kind_of(number)}): {type(error).__name__}: {error}"]
    return []

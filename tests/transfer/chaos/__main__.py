"""Runs worlds until enough faults were injected, in several processes, and prints what came of them.

A failure names the world; `--world` runs it alone.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import time

from pdserve.process import configure_logging
from tests.transfer.chaos.report import Tally
from tests.transfer.chaos.runs import run_world, run_worlds


def main() -> int:
    """Returns the exit status: 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m tests.transfer.chaos", description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000, help="stop after so many")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 30), help="draw the same worlds again")
    parser.add_argument("--world", type=int, help="run this world only")
    parser.add_argument(
        "--jobs", type=int, default=1 + (os.cpu_count() or 1), help="worlds at a time; they mostly wait"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no world after that")
    chosen = parser.parse_args()
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    configure_logging("info")
    print(f"seed {chosen.seed}", flush=True)
    total, failures, began_s = Tally(), [], time.monotonic()
    if chosen.world is not None:
        total = run_world(chosen.seed, chosen.world)
    else:
        failures = run_worlds(chosen.seed, chosen.faults, chosen.jobs, chosen.minutes * 60, total)
    for failure in failures:
        print(f"{failure}\nrun it alone with --seed {chosen.seed} --world {failure.split()[1]}\n")
    print(f"{total.table()}\n{time.monotonic() - began_s:.0f} s, seed {chosen.seed}, {len(failures)} worlds failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

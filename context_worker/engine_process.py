"""The engine of a context worker: run with `python -m`, told what to do on standard input."""

from __future__ import annotations

import sys

from pdserve.worker.engine_child import run_engine

if __name__ == "__main__":
    sys.exit(run_engine(lambda transceiver: {"exporter": transceiver.exporter}))

"""Living and dying of processes: ends with the parent, logs in one form."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

PARENT_VARIABLE = "PDSERVE_PARENT_PID"

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `number` to this process when its parent ends, however that ends (prctl(2)).

    A process whose parent is already gone exits at once. Does nothing where there is no prctl, or when the
    process was not started by pdserve (`PDSERVE_PARENT_PID` is unset): a worker started by hand may outlive a shell.
    """
    expected = os.environ.pop(PARENT_VARIABLE, None)
    if expected is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != int(expected):
        sys.exit(f"parent process {expected} is gone")


def child_environment(**extra: str) -> dict[str, str]:
    """This process's environment for a child that should end with it."""
    return {**os.environ, PARENT_VARIABLE: str(os.getpid()), **extra}


def configure_logging(level: str) -> None:
    """One line an event on standard error."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)

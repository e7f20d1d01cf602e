"""Living and dying of processes, and how they run: end with the parent, logs in one form, no pauses for old garbage."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import sys

PARENT_VARIABLE = "PDSERVE_PARENT_PID"

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29


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


_ALLOCATIONS_A_COLLECTION = 10_000


def freeze_startup_objects() -> None:
    """Have the garbage collector never look again at what lives now; to be called once, when a process is warm.

    A full collection visits every object while no token moves: 250 to 330 ms where torch, transformers, triton and a
    model are loaded (248,000 objects), 19 ms in a worker's server (58,000). And a step of 256 sequences allocates more
    objects than the collector's usual 700 between two looks: in 7 s of such steps, 742 collections of up to 5 ms in the
    engine became 2 of 0.6 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_ALLOCATIONS_A_COLLECTION)


_SWITCH_INTERVAL_S = 0.00005
_TIMER_SLACK_NS = 1000


def share_interpreter_fairly() -> None:
    """Have a thread that computes make room for one that wakes up within 0.1 ms, instead of 5 ms; called before the
    other threads are started.

    A transceiver's thread wakes up several times a handoff, for microseconds each, and its engine's thread holds the
    interpreter while it prepares a step. Such a wake-up took 5.1 ms beside a thread that computes; 0.34 with turns of
    0.2 ms, 0.19 with 0.05, and 0.09 without the 50 us by which the kernel may be late. Shorter turns gain little, and
    of 5 us the computing thread gets nothing done.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)


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

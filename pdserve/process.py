"""Living and dying of processes, and how they run: end with the parent, logs in one form, no pauses for old garbage."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import logging
import os
import resource
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

from pdserve.log_output import LogHandler, standard_error

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Exit statuses. A process that ends with EXIT_CONFIG has a configuration that can't be served; with EXIT_ADDRESS, its
# address is another's or not this host's; with EXIT_FAILED, something is amiss that may be better next time. A worker
# that was drained through the manager ends with EXIT_DRAINED: nobody starts it again.
EXIT_OK, EXIT_FAILED, EXIT_CONFIG, EXIT_ADDRESS, EXIT_DRAINED = 0, 1, 2, 3, 4

# What a process is told by the one that started it. Names that begin with PDSERVE_ are keys of the configuration.
PARENT_VARIABLE = "_PDSERVE_PARENT_PID"
INSTANCE_VARIABLE = "_PDSERVE_INSTANCE"

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send `number` to this process when its parent ends, however that ends (prctl(2)).

    A process whose parent is already gone exits at once. Does nothing where there is no prctl, or when the
    process was not started by pdserve (`_PDSERVE_PARENT_PID` is unset): a worker started by hand may outlive a shell.
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


@functools.cache
def instance() -> str:
    """What tells this start of this process from all others: drawn by who started it, or by itself. /health says it."""
    return os.environ.pop(INSTANCE_VARIABLE, None) or new_instance()


def new_instance() -> str:
    """An identity for a process that is about to be started."""
    return uuid.uuid4().hex


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a process to finish its work and end: Ctrl-C, SIGTERM, and the end of its terminal, unless
    it was started to outlive that (nohup)."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGTERM, signal.SIGINT, *hangup)


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


def run_loop(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run what `main` makes on an event loop of uvloop's. Raises OSError if the system has none to give."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop()
        return runner.run(main())


def open_standard_descriptors() -> None:
    """Open /dev/null as those of descriptors 0 to 2 that were closed when the process started: otherwise a socket may
    get the number, and log lines with it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def allow_all_descriptors() -> int:
    """Raise this process's limit of open files to what the system lets it have: each peer's link takes a dozen, and the
    usual limit of 1024 is there for programs that can't count further (select(2)). Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError) as error:
            log.warning("the limit of open files stays at %d: %s", soft, error)
            return soft
    return hard


def configure_logging(level: str) -> None:
    """One line an event on standard error, which holds up nobody; warnings and what threads die of go there, too."""
    logging.basicConfig(level=level.upper(), handlers=[LogHandler(standard_error())], force=True)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _log_exception
    sys.unraisablehook = lambda args: log.error(
        "%s: %r", args.err_msg or "ignored", args.object, exc_info=args.exc_value
    )
    threading.excepthook = _log_thread_exception


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    log.critical("the process ends", exc_info=(kind, error, trace))


def _log_thread_exception(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None:
        log.error("thread %s ends", args.thread and args.thread.name, exc_info=args.exc_value)

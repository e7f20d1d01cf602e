"""How a process that serves ends: told once, it finishes what is open; told again, it ends at once.

Proxy, workers and `up` use it. `up` passes the first signal on to its children, and answers the second with SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pdserve.process import stop_signals

EVERY_S = 5.0


class Stop:
    """How far the process is to end: `asked` is set by the first SIGINT, SIGTERM or SIGHUP, or by `ask`; `at_once` by
    the second SIGINT or SIGTERM."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def ask(self) -> None:
        """Have the process finish what is open, and end."""
        self.asked.set()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Listen to the process's signals while this is open."""
        loop = asyncio.get_running_loop()
        numbers = stop_signals()
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        # A terminal that goes says so twice, to its processes itself and through the shell.
        at_once = self.asked.is_set() and number is not signal.SIGHUP
        (self.at_once if at_once else self.asked).set()


async def drain(
    log: logging.Logger,
    stop: Stop,
    idle: Coroutine[Any, Any, object],
    open_requests: Callable[[], int],
    timeout_s: float,
) -> bool:
    """Wait until `idle` returns, and log meanwhile how many requests are open.

    Returns False if some are left: after `timeout_s`, or when the process is told to end at once.
    """
    tasks = [asyncio.create_task(idle), asyncio.create_task(stop.at_once.wait())]
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    try:
        while (left_s := deadline_s - asyncio.get_running_loop().time()) > 0:
            if (count := open_requests()) and not any(task.done() for task in tasks):
                what, them = ("1 request", "it") if count == 1 else (f"{count} requests", "them")
                log.warning("draining: %s open, %.0f s left; Ctrl-C again ends %s", what, left_s, them)
            done, _ = await asyncio.wait(tasks, timeout=min(EVERY_S, left_s), return_when=asyncio.FIRST_COMPLETED)
            if done:
                break
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return open_requests() == 0

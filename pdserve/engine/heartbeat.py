"""Says that a process runs, from a thread of its own: a step may take long, and a frozen process is silent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

BEAT_S = 0.5


@contextlib.contextmanager
def beating(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` every `BEAT_S` in another thread, for as long as the body runs."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(BEAT_S):
            beat()

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()

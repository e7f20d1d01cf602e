"""Says that a process runs, from a thread of its own: a step may take long, and a frozen process is silent.

A step that never ends (a device that hangs) is noticed by that thread, too.
"""

from __future__ import annotations

import contextlib
import math
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


class HangDetector:
    """Whether one step has run for `timeout_s` (None: no step is too long), counted in beats: time in which the whole
    process stood still counts against nobody.

    The thread that steps enters and leaves it; `beat` is called in the other.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = math.inf if timeout_s is None else timeout_s
        self._step: object | None = None
        self._seen: object | None = None
        self._seen_s = 0.0

    def __enter__(self) -> None:
        self._step = object()

    def __exit__(self, *_: object) -> None:
        self._step = None

    def beat(self) -> bool:
        """Another `BEAT_S` has passed; whether the step under way is held to hang."""
        step = self._step
        self._seen_s = self._seen_s + BEAT_S if step is not None and step is self._seen else 0.0
        self._seen = step
        return self._seen_s >= self.timeout_s

"""Says that the engine's process runs, from a thread of its own: a step may take long, and a frozen one is silent."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import zmq

from pdserve.protocol import EngineAlive, encode

BEAT_S = 0.5


@contextlib.contextmanager
def beating(context: zmq.Context[Any], address: str) -> Iterator[None]:
    """Send `EngineAlive` to `address` every `BEAT_S`, for as long as the body runs."""
    stopped = threading.Event()
    thread = threading.Thread(target=_beat, args=(context, address, stopped), name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _beat(context: zmq.Context[Any], address: str, stopped: threading.Event) -> None:
    frame = encode(EngineAlive())
    with context.socket(zmq.PUSH) as pipe:
        pipe.set_hwm(1)  # a server that is frozen itself needs to hear it once
        pipe.linger = 0
        pipe.connect(address)
        while not stopped.wait(BEAT_S):
            with contextlib.suppress(zmq.Again):
                pipe.send(frame, zmq.NOBLOCK)

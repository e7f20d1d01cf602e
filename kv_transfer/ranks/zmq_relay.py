"""`Relay` between processes of one host: ZMQ pipes over sockets in a private folder.

The receiver binds and the sender connects. So a message of rank 0 to a follower that has not started yet waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import zmq

RECONNECT_MS = 10


class ZmqRelay:
    """One rank's end.

    Args:
        folder: the same for all ranks, empty, and known to them alone; its path is short (a socket's has 107 bytes).
        rank: 0 leads.
        num_ranks: of the worker.
    """

    def __init__(self, folder: Path, rank: int, num_ranks: int) -> None:
        targets = range(1, num_ranks) if rank == 0 else (0,)
        self._inbox_address = _address(folder, rank)
        self._outbox_addresses = [_address(folder, target) for target in targets]
        self._outboxes: list[zmq.Socket[bytes]] = []
        self._on_frame: Callable[[bytes], None]
        self._is_open = False

    def start(self, on_frame: Callable[[bytes], None]) -> None:
        self._on_frame = on_frame
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._inbox = self._socket(zmq.PULL)
        self._inbox.bind(self._inbox_address)
        for address in self._outbox_addresses:
            outbox = self._socket(zmq.PUSH)
            outbox.reconnect_ivl = RECONNECT_MS
            outbox.connect(address)
            self._outboxes.append(outbox)
        self._descriptor = int(self._inbox.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive)
        self._loop.call_soon(self._receive)
        self._is_open = True

    def send(self, frame: bytes) -> None:
        for outbox in self._outboxes:
            with contextlib.suppress(zmq.Again):  # without a high-water mark: that rank has gone
                outbox.send(frame, zmq.NOBLOCK)

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._descriptor)
        for socket in (self._inbox, *self._outboxes):
            socket.close()
        self._context.term()

    def _socket(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.set_hwm(0)
        socket.linger = 0
        return socket

    def _receive(self) -> None:
        # The descriptor tells of a change, not of a state: everything must be taken, or it stays silent.
        while self._is_open:
            try:
                frame = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_frame(frame)


def _address(folder: Path, rank: int) -> str:
    return f"ipc://{folder}/kv{rank}"

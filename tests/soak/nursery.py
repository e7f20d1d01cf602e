"""Makes worker processes in milliseconds: forks them from a process that has imported everything.

A worker that is started by `python -m` takes three seconds of a core to import torch, twice; a thousand of them would
take an hour. `python -m tests.soak.nursery SOCKET` imports what they need, starts no thread, and forks one process for
each connection to `SOCKET`: a worker's server, or its engine on the behalf of `engine_stub`. The connection is the
child's life line: whoever closes it kills the child, and gets its exit status before the nursery closes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

SOCKET_VARIABLE = "SOAK_NURSERY"
ROLE_VARIABLE = "SOAK_ROLE"
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.01


class Birth(msgspec.Struct):
    """What to run: the engine of a worker of `role`, or, with a `config` file, the server of worker `index`."""

    role: str
    index: int = 0
    config: str = ""


@dataclass
class Child:
    pid: int
    line: socket.socket


def ask_for(nursery: str, birth: Birth, log: Path | None = None) -> socket.socket:
    """The life line of a new process, which writes to `log`; without, it has the caller's standard streams."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(nursery)
    if log is None:
        socket.send_fds(line, [msgspec.json.encode(birth)], [0, 1, 2])
        return line
    with Path(os.devnull).open("rb") as nothing, log.open("ab") as output:
        socket.send_fds(line, [msgspec.json.encode(birth)], [nothing.fileno(), output.fileno(), output.fileno()])
    return line


class Nursery:
    """Forks children and buries them. `run` returns when its own parent is gone."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._children: dict[int, Child] = {}

    def run(self) -> None:
        parent = os.getppid()
        while os.getppid() == parent:
            for event, _ in self._selector.select(_POLL_S):
                if event.fileobj is self._listener:
                    self._give_birth()
                else:
                    self._hear(event.data)
            self._bury()

    def _give_birth(self) -> None:
        line, _ = self._listener.accept()
        message, descriptors, _, _ = socket.recv_fds(line, 4096, 3)
        pid = os.fork()
        if pid == 0:
            os._exit(self._live(msgspec.json.decode(message, type=Birth), descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        child = Child(pid, line)
        self._children[pid] = child
        self._selector.register(line, selectors.EVENT_READ, child)

    def _live(self, birth: Birth, descriptors: list[int]) -> int:
        """In the child."""
        self._selector.close()
        self._listener.close()
        for child in self._children.values():
            child.line.close()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, buffering=1, closefd=False)  # noqa: SIM115 - they are the process's own
            for number, mode in enumerate(("r", "w", "w"))
        )
        run: Callable[[Birth], int] = _serve if birth.config else _compute
        return run(birth)

    def _hear(self, child: Child) -> None:
        """A byte is the number of a signal to send; the end of the line is SIGKILL."""
        data = b""
        with contextlib.suppress(ConnectionError):
            data = child.line.recv(1)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, data[0] if data else signal.SIGKILL)
        if not data:
            self._selector.unregister(child.line)

    def _bury(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            child = self._children.pop(pid)
            with contextlib.suppress(KeyError):
                self._selector.unregister(child.line)
            with contextlib.suppress(OSError):
                child.line.send(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))
            child.line.close()


def _serve(birth: Birth) -> int:
    from pdserve.config import load
    from pdserve.process import configure_logging
    from pdserve.worker.launch import run_worker

    os.environ[ROLE_VARIABLE] = birth.role
    configure_logging("warning")
    role = "context" if birth.role == "context" else "generation"
    return run_worker(load([Path(birth.config)]), role, birth.index, "tests.soak.engine_stub")


def _compute(birth: Birth) -> int:
    from pdserve.roles.main import run_engine

    return run_engine()


def main() -> int:
    import torch

    # Whatever is imported here is imported once; nothing of it may start a thread, which a fork would lose.
    import pdserve.roles.main
    import pdserve.worker.server  # noqa: F401

    torch.set_num_threads(1)
    Nursery(sys.argv[1]).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

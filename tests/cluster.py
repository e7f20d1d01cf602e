"""A real cluster for tests: `pdserve up` in a process of its own, on free ports, ended without leftovers."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from pdserve.config.cluster import merge

MODEL = "smollm2-135m-instruct"


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """`pdserve up` with `config` laid over a small CPU default; use as a context manager."""

    def __init__(self, folder: Path, config: dict[str, Any] | None = None, start_timeout_s: float = 120.0) -> None:
        proxy_port, manager_port = free_ports(2)
        default = {
            "model": MODEL,
            "dtype": "float32",
            "device": "cpu",
            "port": proxy_port,
            "max_batch_size": 16,
            "max_num_tokens": 512,
            "kv_cache_config": {"max_tokens": 8192},
            "cache_transceiver_config": {"checksum": True},
            "manager": {"port": manager_port},
            "disagg_cluster": {"heartbeat_interval_sec": 0.5, "inactive_timeout_sec": 3, "drain_timeout_sec": 5},
        }
        self.config = merge(default, config or {})
        self.url = f"http://localhost:{self.config['port']}"
        self.manager_url = f"http://localhost:{self.config['manager']['port']}"
        self.log = folder / "cluster.log"
        self._file = folder / "cluster.yaml"
        self._file.write_text(json.dumps(self.config))
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Cluster:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pdserve", "up", "-c", str(self._file)], stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self.wait_ready(self._start_timeout_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until the proxy's /health says 200."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise AssertionError(f"the cluster ended while starting:\n{self.log.read_text()[-4000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        raise AssertionError(f"the cluster is not ready after {timeout_s} s:\n{self.log.read_text()[-4000:]}")

    def stop(self, number: signal.Signals = signal.SIGTERM, timeout_s: float = 40.0) -> int:
        """End the cluster; fails if a process stays behind."""
        if self._process is None:
            return 0
        family = self.processes()
        if self._process.poll() is None:
            self._process.send_signal(number)
        status = self._process.wait(timeout_s)
        self._process = None
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        assert not alive, f"left behind: {alive}"
        return status

    def processes(self) -> list[psutil.Process]:
        """All processes below `pdserve up`."""
        if self._process is None:
            return []
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> dict[str, dict[str, Any]]:
        """Registered workers by id, as the manager lists them."""
        records = get_json(f"{self.manager_url}/v1/workers")["workers"]
        return {record["info"]["worker_id"]: record for record in records}

    def metric(self, worker_id: str, name: str, **labels: str) -> float:
        """Sum of the samples of a worker's metric whose labels match."""
        return metric_of(self.workers()[worker_id]["info"]["url"], name, **labels)

    def all_blocks(self) -> dict[str, float]:
        """KV blocks of each worker's pool; so many may be taken when nothing runs."""
        return {name: self.metric(name, "pdserve_kv_blocks_all") for name in self.workers()}

    def available_blocks(self) -> dict[str, float]:
        """KV blocks that a request may take, by worker."""
        return {name: self.metric(name, "pdserve_kv_blocks_available") for name in self.workers()}

    def wait_blocks(self, expected: dict[str, float], timeout_s: float = 60.0) -> dict[str, float]:
        """The available blocks, once they equal `expected` or the time is up."""
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self.available_blocks()
            if seen == expected or time.monotonic() > deadline:
                return seen
            time.sleep(0.1)


def get_json(url: str, timeout_s: float = 5.0) -> Any:
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return json.load(response)


def metric_of(url: str, name: str, **labels: str) -> float:
    """Sum of the samples `name` at `url`/metrics whose labels match."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        text = response.read().decode()
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            given = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if all(given.get(key) == value for key, value in labels.items()):
                total += float(match[3])
    return total

"""The cluster over a real etcd: membership lives there, traffic does not."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import MODEL, Cluster
from tests.etcd_server import EtcdServer

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


def ask(cluster: Cluster) -> str:
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    request = urllib.request.Request(
        f"{cluster.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(json.load(response)["choices"][0]["text"])


def ps(folder: Path) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-m", "pdserve", "ps", "--json", "-c", str(folder / "cluster.yaml")],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


def test_a_cluster_over_etcd(etcd: EtcdServer, tmp_path: Path) -> None:
    """`ps` lists the workers; requests go on while etcd is away; the workers are listed again when it is back."""
    config = {"disagg_cluster": {"cluster_uri": f"etcd://{etcd.endpoint}", "cluster_name": "e2e"}}
    with Cluster(tmp_path, config) as cluster:
        answer = ask(cluster)
        assert "Paris" in answer
        rows = {row["name"]: row for row in ps(tmp_path)}
        assert set(rows) == {"manager", "proxy", "context-0", "generation-0"}
        assert all(row["state"] == "ready" for row in rows.values())
        assert len({row["pid"] for row in rows.values()}) == 4

        etcd.kill()
        for _ in range(3):
            assert ask(cluster) == answer
            time.sleep(0.5)
        assert len(cluster.processes()) >= 6, "nobody exits because etcd is away"

        etcd.start()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            states = {row["name"]: row["state"] for row in ps(tmp_path)}
            if states == dict.fromkeys(rows, "ready"):
                break
            time.sleep(0.5)
        assert states == dict.fromkeys(rows, "ready")
        assert ask(cluster) == answer

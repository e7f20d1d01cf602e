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

from tests.cluster import Cluster
from tests.e2e.reference import PROMPTS, Reference
from tests.etcd_server import EtcdServer
from tests.small_model import SMALL_MODEL

pytestmark = pytest.mark.etcd


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


def ask(cluster: Cluster) -> str:
    body = {"model": SMALL_MODEL, "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
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


def test_a_cluster_over_etcd(etcd: EtcdServer, tmp_path: Path, small_model: Path, small_reference: Reference) -> None:
    """`ps` lists the workers; requests go on while etcd is away; the workers are listed again when it is back."""
    cluster_config = {"cluster_uri": f"etcd://{etcd.endpoint}", "cluster_name": "e2e"}
    config = {"model": str(small_model), "disagg_cluster": cluster_config}
    with Cluster(tmp_path, config) as cluster:
        answer = ask(cluster)
        assert answer == small_reference.text(PROMPTS[0], 4)
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

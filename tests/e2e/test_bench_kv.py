"""`pdserve bench kv` on a cluster that serves: plausible figures, unharmed requests, and every block back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp

from tests.cluster import Cluster, metric_of
from tests.e2e.reference import PROMPTS, Reference
from tests.e2e.test_answers import complete, greedy

SIZES_MIB = ("1", "8", "4096")
TOKEN_BYTES = 30 * 2 * 3 * 64 * 4
KINDS = ("exposed", "block_wait")


def command(cluster: Cluster, folder: Path, source: str, target: str, *flags: str) -> subprocess.CompletedProcess[str]:
    file = folder / "manager.yaml"
    file.write_text(json.dumps({"manager": cluster.config["manager"]}))
    arguments = ["bench", "kv", "-c", str(file), "--from", source, "--to", target, *flags]
    return subprocess.run(
        [sys.executable, "-m", "pdserve", *arguments], capture_output=True, text=True, timeout=90, check=False
    )


def counted(cluster: Cluster) -> list[float]:
    """Handoffs in the generation worker's histograms."""
    return [cluster.metric("generation-0", f"pdserve_kv_transfer_{what}_seconds_count") for what in KINDS]


async def test_a_pair_is_measured_while_it_serves(cluster: Cluster, tmp_path: Path, reference: Reference) -> None:
    before = cluster.available_blocks()
    handoffs = counted(cluster)
    gaps = metric_of(cluster.url, "pdserve_proxy_handoff_gap_seconds_count")
    flags = ("--mib", *SIZES_MIB, "--repeats", "3", "--evict", "--json")
    bench = asyncio.create_task(asyncio.to_thread(command, cluster, tmp_path, "context-0", "generation-0", *flags))
    served = 0
    async with aiohttp.ClientSession() as session:
        while not bench.done():
            prompt = PROMPTS[served % len(PROMPTS)]
            answer = await complete(session, cluster.url, greedy(prompt))
            assert answer["choices"][0]["text"] == reference.text(prompt)
            served += 1
    done = await bench
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["rows"]
    small, middle, large = rows
    for row, mib in ((small, 1), (middle, 8)):
        assert row["nbytes"] >= mib * 2**20 - TOKEN_BYTES
        assert row["nbytes"] % (32 * TOKEN_BYTES) == 0, "whole blocks travel"
        assert len(row["seconds"]) == 3
        assert 0.0005 < row["gb_per_s"] <= row["busy_gb_per_s"] < 100
        assert row["plain_gb_per_s"] > row["gb_per_s"]
    assert "blocks are wanted" in large["skipped"]
    assert "4295.0 MB" in done.stderr
    assert cluster.wait_blocks(before) == before
    expected = [count + served + 8 for count in handoffs]
    for _ in range(30):
        if counted(cluster) == expected:
            break
        await asyncio.sleep(0.1)
    assert counted(cluster) == expected
    assert metric_of(cluster.url, "pdserve_proxy_handoff_gap_seconds_count") == gaps + served


async def test_people_get_a_table(cluster: Cluster, tmp_path: Path) -> None:
    done = command(cluster, tmp_path, "context-0", "generation-0", "--mb", "1", "4", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    first, header, small, large, *notes = done.stdout.splitlines()
    assert "GB/s" in first
    assert header.split()[0] == "SIZE"
    assert [line.split()[:2] for line in (small, large)] == [["1.5", "MB"], ["4.4", "MB"]]
    assert "{" not in done.stdout
    assert bool(notes) == ("*" in small + large)


async def test_what_cannot_be_measured_is_said(cluster: Cluster, tmp_path: Path) -> None:
    for source, target, said in (
        ("context-7", "generation-0", "no worker context-7 is registered; there are: context-0, generation-0"),
        ("generation-0", "context-0", "generation-0 is a generation worker"),
    ):
        done = command(cluster, tmp_path, source, target)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr

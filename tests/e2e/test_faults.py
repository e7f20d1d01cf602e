"""Clients that leave, workers that die, and a supervisor that must not leave anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.cluster import Cluster
from tests.e2e.reference import PROMPTS, Reference
from tests.small_model import SMALL_MODEL, VOCAB_SIZE

LONG_ANSWER = 400
"""Tokens that take the small model's workers most of a second, so that a fault finds the answer unfinished."""


async def stream_some(session: aiohttp.ClientSession, url: str, body: dict[str, Any], leave_after: int | None) -> int:
    """Read a streamed completion; close the connection after `leave_after` events if given. Returns events read."""
    events = 0
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                assert "error" not in json.loads(line[6:])
                events += 1
                if events == leave_after:
                    response.close()
                    return events
    return events


async def test_two_hundred_streams_half_of_them_cancelled_leave_no_block_behind(small_cluster: Cluster) -> None:
    cluster = small_cluster
    rng = random.Random(11)
    gate = asyncio.Semaphore(16)

    async def one(number: int) -> None:
        prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 90))]
        body = {"model": SMALL_MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        leave_after = rng.randrange(1, 12) if number % 2 else None
        async with gate:
            if number % 8 == 1:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.random() * 0.3):
                        await stream_some(session, cluster.url, body, None)
            else:
                await stream_some(session, cluster.url, body, leave_after)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(number) for number in range(200)))
    every = cluster.all_blocks()
    assert cluster.wait_blocks(every) == every
    for worker in ("context-0", "generation-0"):
        assert cluster.metric(worker, "pdserve_kv_blocks", state="used") == 0
        assert cluster.metric(worker, "pdserve_kv_blocks", state="reserved") == 0
        assert cluster.metric(worker, "pdserve_kv_staging_in_use_bytes") == 0
        assert cluster.metric(worker, "pdserve_kv_transfers_in_flight") == 0


def engine_of(cluster: Cluster, worker_id: str) -> psutil.Process:
    server = psutil.Process(cluster.workers()[worker_id]["info"]["pid"])
    return server.children()[0]


async def wait_restarted(cluster: Cluster, worker_id: str, old_pid: int, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        record = cluster.workers().get(worker_id)
        if record and record["info"]["pid"] != old_pid:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{worker_id} did not come back")


@pytest.mark.parametrize("worker_id", ["generation-0", "context-0"])
@pytest.mark.parametrize("victim", ["server", "engine"])
async def test_a_killed_worker_comes_back_and_its_requests_go_on(
    small_cluster: Cluster, small_reference: Reference, worker_id: str, victim: str
) -> None:
    """The request in flight is answered in full, with the same tokens, after its worker is back."""
    cluster = small_cluster
    pid = cluster.workers()[worker_id]["info"]["pid"]
    body = {"model": SMALL_MODEL, "prompt": PROMPTS[1], "max_tokens": LONG_ANSWER, "temperature": 0}
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{cluster.url}/v1/completions", json={**body, "stream": True}) as response:
            assert response.status == 200
            text = ""
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                if not text:
                    process = psutil.Process(pid) if victim == "server" else engine_of(cluster, worker_id)
                    process.send_signal(signal.SIGKILL)
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"]
        assert text == small_reference.text(PROMPTS[1], LONG_ANSWER)
        await wait_restarted(cluster, worker_id, pid)
        cluster.wait_ready()
        async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
            assert response.status == 200
            assert (await response.json())["choices"][0]["text"] == text


async def test_requests_of_a_frozen_worker_go_on_elsewhere_and_it_comes_back(
    tmp_path: Path, small_model: Path, small_reference: Reference
) -> None:
    config = {
        "model": str(small_model),
        "generation_servers": {"num_instances": 2},
        "disagg_cluster": {"minimal_instances": {"generation_servers": 2}},
    }
    with Cluster(tmp_path, config) as running:
        await go_on_without(running, small_reference, "server")
        await go_on_without(running, small_reference, "engine")


async def go_on_without(running: Cluster, reference: Reference, what: str) -> None:
    """Freeze the server or the engine of a generation worker while it streams."""
    every = running.all_blocks()
    body = {"model": SMALL_MODEL, "prompt": PROMPTS[1], "max_tokens": LONG_ANSWER, "temperature": 0, "stream": True}
    frozen: psutil.Process | None = None
    text = ""
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{running.url}/v1/completions", json=body) as response:
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += event["choices"][0]["text"]
                if frozen is None and len(text) > 20:
                    worker_id = busiest(running)
                    pid = running.workers()[worker_id]["info"]["pid"]
                    frozen = psutil.Process(pid) if what == "server" else engine_of(running, worker_id)
                    frozen.suspend()
                    began_s = time.monotonic()
        assert time.monotonic() - began_s < 20
    assert text == reference.text(PROMPTS[1], LONG_ANSWER)
    assert frozen is not None
    await listed(running, worker_id, False)
    frozen.resume()
    await listed(running, worker_id, True)
    assert running.wait_blocks(every) == every


async def listed(running: Cluster, worker_id: str, expected: bool) -> None:
    for _ in range(100):
        if (worker_id in running.workers()) == expected:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{worker_id} is {'not ' if expected else ''}listed")


def busiest(running: Cluster) -> str:
    """The generation worker whose sequence is growing."""
    workers = [name for name in running.workers() if name.startswith("generation")]
    return max(workers, key=lambda name: running.metric(name, "pdserve_engine_running"))


def test_killing_the_supervisor_leaves_nothing_behind(tmp_path: Path, small_model: Path) -> None:
    with Cluster(tmp_path, {"model": str(small_model)}) as running:
        family = running.processes()
        assert len(family) >= 6
        running.stop(signal.SIGKILL)
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive


def test_ctrl_c_ends_a_cluster_that_is_still_starting(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "pdserve", "up", "-c", str(tmp_path / "cluster.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    time.sleep(4)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output.decode()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
    assert cluster.processes() == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--context_servers.num_instnces=2"], "context_servers.num_instnces: unknown key"),
        (["--generation_servers.max_batch_size=0"], "generation_servers.max_batch_size"),
        (["--model=/nowhere/at/all"], "/nowhere/at/all"),
        (["-c", "/nowhere.yaml"], "/nowhere.yaml"),
    ],
)
def test_a_bad_configuration_ends_the_start(flags: list[str], said: str, tmp_path: Path) -> None:
    Cluster(tmp_path)  # writes its file, with ports that are free
    done = subprocess.run(
        [sys.executable, "-m", "pdserve", "up", "-c", str(tmp_path / "cluster.yaml"), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_refuses_its_configuration_ends_the_cluster(tmp_path: Path, small_model: Path) -> None:
    cluster = Cluster(tmp_path, {"model": str(small_model), "generation_servers": {"max_seq_len": 10_000_000}})
    done = subprocess.run(
        [sys.executable, "-m", "pdserve", "up", "-c", str(tmp_path / "cluster.yaml")],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 2
    assert "max_seq_len" in done.stdout
    assert cluster.processes() == []

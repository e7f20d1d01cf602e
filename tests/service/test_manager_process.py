"""The manager as a process of its own: `run`, from start to SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pdserve.cluster_api import WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.errors import PdserveError
from tests.etcd_server import EtcdServer
from tests.manager import until, worker

_PROGRAM = """
import json, sys, uvloop
from cluster_manager.server import run
from pdserve.config import ClusterConfig
uvloop.run(run(ClusterConfig.model_validate(json.loads(sys.argv[1]))))
"""


@asynccontextmanager
async def manager_process(uri: str, port: int) -> AsyncIterator[asyncio.subprocess.Process]:
    config = {
        "model": "m",
        "manager": {"hostname": "127.0.0.1", "port": port},
        "disagg_cluster": {"cluster_uri": uri, "cluster_name": "process"},
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PROGRAM, json.dumps(config)), stderr=asyncio.subprocess.PIPE
    )
    yield process
    if process.returncode is None:
        process.kill()
    await process.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("kind", ["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def test_it_serves_until_sigterm_and_ends_at_once(kind: str, request: pytest.FixtureRequest) -> None:
    uri = "memory://"
    if kind == "etcd":
        server: EtcdServer = request.getfixturevalue("etcd_server")
        uri = server.uri
    port = free_port()
    async with manager_process(uri, port) as process, ClusterClient(f"http://127.0.0.1:{port}") as client:

        async def serves() -> bool:
            try:
                await client.cluster()
            except PdserveError:
                return False
            return True

        await until(serves, limit_s=30)
        lease = (await client.register(worker("w1"))).lease_id
        events = client.watch()
        assert [record.info.worker_id for record in (await anext(events)).workers or []] == ["w1"]
        await client.deregister("w1", lease)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert time.monotonic() - started < 3
        await events.aclose()


async def test_a_taken_port_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with manager_process("memory://", port) as process:
            _, errors = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert f"can't listen on 127.0.0.1:{port}" in errors.decode()


@pytest.mark.etcd
async def test_an_outage_of_etcd_is_a_matter_of_a_few_lines(own_etcd_server: EtcdServer) -> None:
    """No traceback, and nothing that is destroyed while it runs, whether etcd dies, hangs or comes back, with watchers
    that stay, go, or are there at the end."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with manager_process(own_etcd_server.uri, port) as process, ClusterClient(url, timeout_s=5) as client:

        async def is_answered() -> bool:
            try:
                await client.workers()
            except PdserveError:
                return False
            return True

        await until(is_answered, limit_s=30)
        following = [asyncio.create_task(_follow(ClusterClient(url, bookmark_interval_s=0.2))) for _ in range(4)]
        lease = (await client.register(worker("w1"))).lease_id
        for outage in range(2):
            if outage:
                own_etcd_server.signal(signal.SIGSTOP)
            else:
                await asyncio.to_thread(own_etcd_server.kill)
            for _ in range(3):
                with pytest.raises(PdserveError):
                    await client.heartbeat("w1", lease, "1", WorkerLoad())
            following.pop().cancel()
            if outage:
                own_etcd_server.signal(signal.SIGCONT)
            else:
                await asyncio.to_thread(own_etcd_server.start)
            await until(is_answered, limit_s=30)
        await asyncio.to_thread(own_etcd_server.kill)
        process.send_signal(signal.SIGTERM)
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
    said = errors.decode()
    assert process.returncode == 0
    for sign in ("Traceback", "Task was destroyed", "aclose()", "never awaited", "never retrieved"):
        assert sign not in said, said[-4000:]


async def _follow(client: ClusterClient) -> None:
    async with client, contextlib.aclosing(client.watch()) as events:
        async for _ in events:
            pass

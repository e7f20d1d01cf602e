"""Every process at an IPv6 address: manager, etcd, worker, proxy, and what asks them."""

from __future__ import annotations

import asyncio
import re
import socket
import sys
from pathlib import Path

import aiohttp
import pytest

import proxy.server
from pdserve.addresses import http_url
from pdserve.cluster_api import WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig, ClusterUri
from pdserve.process_list import collect
from tests.etcd_server import EtcdServer, etcd_store
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.proxy_cluster import byte_level_tokenizer
from tests.manager import TestManager, until


@pytest.fixture(autouse=True)
def has_ipv6() -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("this host has no ::1")


def free_port() -> int:
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.etcd
async def test_a_store_at_an_ipv6_address(tmp_path: Path) -> None:
    with EtcdServer(tmp_path, host="::1") as server:
        assert re.fullmatch(r"etcd://\[::1\]:\d+", server.uri)
        async with etcd_store(*ClusterUri.parse(server.uri).endpoints) as store:
            revision = await store.put("k", b"v")
            assert await store.get("k") == ("k", b"v", revision)


@pytest.mark.parametrize("hostname", ["::1", "[::1]"])
async def test_a_cluster_at_ipv6_addresses_answers(tmp_path: Path, hostname: str) -> None:
    """The proxy's process as the command runs it, the manager's REST, and workers that tell addresses in brackets."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "eos_token_id": 2}')
    workers = [FakeWorker("context-0", "context", host="::1"), FakeWorker("generation-0", "generation", host="::1")]
    workers[1].handoffs = workers[0].handoffs
    async with TestManager(host=hostname, inactive_timeout_sec=60) as manager, ClusterClient(manager.url) as client:
        for each in workers:
            await each.start()
            await client.register(each.record().info)
        config = ClusterConfig.model_validate(
            {
                "model": str(tmp_path),
                "hostname": hostname,
                "port": free_port(),
                "manager": {"hostname": hostname, "port": manager.port},
                "context_servers": {},
                "generation_servers": {},
            }
        )
        serving = asyncio.create_task(proxy.server.run(config))
        url = http_url(config.hostname, config.port)
        async with aiohttp.ClientSession() as session:

            async def is_ready() -> bool:
                try:
                    async with session.get(f"{url}/health") as response:
                        return response.status == 200
                except aiohttp.ClientConnectionError:
                    return False

            await until(is_ready)
            body = {"model": tmp_path.name, "prompt": "hello", "max_tokens": 5}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                assert response.status == 200, await response.text()
            found = await collect(config)
            assert found.problem is None
            assert [row.state for row in found.rows] == ["ready"] * 4
            assert all("[::1]:" in row.address for row in found.rows)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        for each in workers:
            await each.stop()


async def test_a_workers_process_at_an_ipv6_address_registers_and_serves() -> None:
    program = (
        "import sys; from pdserve.config import load; from pdserve.worker.launch import run_worker;"
        "sys.exit(run_worker(load([], sys.argv[1:]), 'context', 0, 'tests.fakes.fake_engine'))"
    )
    async with TestManager(host="::1") as manager, ClusterClient(manager.url) as client:
        keys = [
            "--model=any",
            "--context_servers.hostname=::1",
            "--manager.hostname=::1",
            f"--manager.port={manager.port}",
        ]
        command = [sys.executable, "-c", program, *keys, "--disagg_cluster.drain_timeout_sec=3"]
        process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2])
        try:
            async with aiohttp.ClientSession() as session:

                async def serves() -> bool:
                    for record in (await client.workers()).workers:
                        assert re.fullmatch(r"http://\[::1\]:\d+", record.info.url)
                        async with session.get(f"{record.info.url}/health") as response:
                            body = await response.json()
                            assert body["load"].keys() == WorkerLoad.model_fields.keys()
                            return response.status == 200
                    return False

                await until(serves, limit_s=60)
        finally:
            process.terminate()
            await asyncio.wait_for(process.wait(), 30)

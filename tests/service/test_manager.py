"""The manager's REST interface, over both stores."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from pdserve.cluster_api import WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.errors import NotReady, RequestError, UnknownLease, UnknownWorker
from tests.manager import TestManager, until, worker


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[TestManager]:
    uri = "memory://" if request.param == "memory" else request.getfixturevalue("etcd_server").uri
    async with TestManager(uri=uri, name=uuid.uuid4().hex) as running:
        yield running


@pytest.fixture
async def client(manager: TestManager) -> AsyncIterator[ClusterClient]:
    async with ClusterClient(manager.url) as made:
        yield made


async def test_a_worker_joins_beats_drains_and_leaves(client: ClusterClient) -> None:
    reply = await client.register(worker("w1"))
    assert (reply.ttl_s, reply.heartbeat_interval_s) == (1.0, 0.1)
    [record] = (await client.workers()).workers
    assert record.info == worker("w1")
    assert record.state == "ready"

    load = WorkerLoad(running=3, blocks_available=5, blocks_total=9)
    assert (await client.heartbeat("w1", reply.lease_id, "1", load)).state == "ready"
    assert (await client.workers()).workers[0].load == load

    assert (await client.drain("w1")).state == "draining"
    assert (await client.drain("w1")).state == "draining"
    assert (await client.heartbeat("w1", reply.lease_id, "1", load)).state == "draining"
    assert (await client.workers()).workers[0].state == "draining"

    await client.deregister("w1", reply.lease_id)
    assert (await client.workers()).workers == []
    with pytest.raises(UnknownLease):
        await client.deregister("w1", reply.lease_id)
    with pytest.raises(UnknownLease):
        await client.heartbeat("w1", reply.lease_id, "1", load)


async def test_a_heartbeat_writes_nothing_whatever_it_tells(client: ClusterClient, manager: TestManager) -> None:
    reply = await client.register(worker("w1"))
    before, _ = await manager.store.scan("/")
    for running in range(5):
        load = WorkerLoad(running=running)
        await client.heartbeat("w1", reply.lease_id, "1", load)
        assert [record.load for record in (await client.workers()).workers] == [load]
    after, _ = await manager.store.scan("/")
    assert after == before, "no key has another revision"


async def test_a_worker_lapses_in_time_unless_it_beats(client: ClusterClient) -> None:
    silent, beating = await client.register(worker("silent")), await client.register(worker("beating"))

    async def only_one() -> bool:
        await client.heartbeat("beating", beating.lease_id, "1", WorkerLoad())
        return [record.info.worker_id for record in (await client.workers()).workers] == ["beating"]

    assert await until(only_one, limit_s=2.5) >= 0.8
    with pytest.raises(UnknownLease) as caught:
        await client.heartbeat("silent", silent.lease_id, "1", WorkerLoad())
    assert caught.value.status == 404


async def test_a_newer_incarnation_replaces_the_older_at_once(client: ClusterClient) -> None:
    old = await client.register(worker("w1", "old"))
    await client.drain("w1")
    new = await client.register(worker("w1", "new"))
    [record] = (await client.workers()).workers
    assert (record.info.incarnation, record.state) == ("new", "ready")
    with pytest.raises(UnknownLease):
        await client.heartbeat("w1", old.lease_id, "old", WorkerLoad())
    with pytest.raises(UnknownLease):
        await client.deregister("w1", old.lease_id)
    with pytest.raises(UnknownLease):
        await client.heartbeat("w1", new.lease_id, "old", WorkerLoad())
    for _ in range(8):  # until the old lease's time is over, which takes nothing with it
        await client.heartbeat("w1", new.lease_id, "new", WorkerLoad())
        await asyncio.sleep(0.2)
    assert [record.info.incarnation for record in (await client.workers()).workers] == ["new"]


async def test_drain_and_load_at_once_lose_neither(client: ClusterClient) -> None:
    reply = await client.register(worker("w1"))
    beats = [client.heartbeat("w1", reply.lease_id, "1", WorkerLoad(running=index)) for index in range(5)]
    await asyncio.gather(client.drain("w1"), *beats)
    last = await client.heartbeat("w1", reply.lease_id, "1", WorkerLoad(running=99))
    assert last.state == "draining"
    assert (await client.workers()).workers[0].load.running == 99


async def test_roles_are_listed_and_counted(client: ClusterClient, manager: TestManager) -> None:
    assert not (await client.cluster()).ready
    await client.register(worker("c1"))
    await client.register(worker("g1", role="generation"))
    await client.register(worker("g2", role="generation"))
    await client.drain("g2")
    assert [r.info.worker_id for r in (await client.workers("generation")).workers] == ["g1", "g2"]
    assert [r.info.worker_id for r in (await client.workers("context")).workers] == ["c1"]
    status = await client.cluster()
    assert status.ready
    assert status.cluster_name == manager.config.cluster_name
    counts = status.generation_servers
    assert (counts.ready, counts.draining, counts.required) == (1, 1, 1)
    await client.drain("g1")
    assert not (await client.cluster()).ready, "draining workers don't count"
    async with aiohttp.ClientSession() as session, session.get(f"{manager.url}/cluster_info") as answer:
        assert (await answer.json())["generation_servers"]["draining"] == 2


async def test_unknown_workers_are_404(client: ClusterClient, manager: TestManager) -> None:
    with pytest.raises(UnknownWorker):
        await client.drain("nobody")
    with pytest.raises(UnknownLease):
        await client.heartbeat("nobody", "123", "1", WorkerLoad())
    async with aiohttp.ClientSession() as session, session.get(f"{manager.url}/v1/workers/nobody") as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (404, "unknown_worker")


GOOD = worker("w1").model_dump(mode="json")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("GET", "/nowhere", None, 404, None),
        ("PUT", "/v1/workers", None, 405, None),
        ("POST", "/v1/workers", "{", 400, "body"),
        ("POST", "/v1/workers", "[]", 400, "body"),
        ("POST", "/v1/workers", {}, 400, "info"),
        ("POST", "/v1/workers", {"info": {**GOOD, "role": "both"}}, 400, "info.role"),
        ("POST", "/v1/workers", {"info": {**GOOD, "worker_id": "a/b"}}, 400, "info.worker_id"),
        ("POST", "/v1/workers", {"info": {**GOOD, "url": "http://h:1\nERROR"}}, 400, "info.url"),
        ("POST", "/v1/workers", {"info": {**GOOD, "device": "x" * 70_000}}, 413, "body"),
        ("POST", "/v1/workers/w1/heartbeat", {"lease_id": "1"}, 400, "incarnation"),
        ("DELETE", "/v1/workers/w1", None, 400, "lease_id"),
        ("GET", "/v1/workers?role=both", None, 400, "role"),
        ("GET", "/v1/workers?rolle=context", None, 400, "rolle"),
        ("GET", "/v1/workers?role=context&role=context", None, 400, "role"),
        ("GET", "/v1/watch?from_revision=x", None, 400, "from_revision"),
        ("GET", "/v1/watch?from_revision=0", None, 400, "from_revision"),
    ],
)
async def test_mistakes_are_4xx_and_name_the_field(
    method: str, path: str, body: Any, status: int, param: str | None
) -> None:
    data = body if isinstance(body, str) else None
    json = None if isinstance(body, str) else body
    async with TestManager() as manager, aiohttp.ClientSession() as session:
        async with session.request(method, manager.url + path, data=data, json=json) as answer:
            error = (await answer.json())["error"]
            assert (answer.status, error["param"]) == (status, param)
            assert error["type"] == "invalid_request_error"
        async with session.get(f"{manager.url}/v1/workers") as answer:
            assert (await answer.json())["workers"] == []


async def test_health_and_metrics_tell_what_happened(client: ClusterClient, manager: TestManager) -> None:
    left = await client.register(worker("left"))
    await client.register(worker("lapses"))
    await client.deregister("left", left.lease_id)
    with pytest.raises(RequestError):
        await client.deregister("left", left.lease_id)
    async with aiohttp.ClientSession() as session:

        async def scrape() -> str:
            async with session.get(f"{manager.url}/metrics") as answer:
                return await answer.text()

        async def is_there(line: str) -> bool:
            return line in (await scrape()).splitlines()

        await until(lambda: is_there('pdserve_manager_workers{role="context",state="ready"} 1.0'))
        await until(lambda: is_there('pdserve_manager_lease_expiries_total{role="context"} 1.0'))
        async with session.get(f"{manager.url}/v1/watch"):
            await until(lambda: is_there("pdserve_manager_watchers 1.0"))
        await until(lambda: is_there("pdserve_manager_watchers 0.0"))
        metrics = await scrape()
        assert 'pdserve_manager_workers{role="context",state="ready"} 0.0' in metrics
        assert 'pdserve_manager_requests_total{route="/v1/workers",status="200"} 2.0' in metrics
        assert 'pdserve_manager_requests_total{route="/v1/workers/{worker_id}",status="204"} 1.0' in metrics
        assert 'pdserve_manager_requests_total{route="/v1/workers/{worker_id}",status="404"} 1.0' in metrics
        assert 'pdserve_manager_store_seconds_count{operation="grant"} 2.0' in metrics
        async with session.get(f"{manager.url}/health") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "ok")


async def test_a_manager_that_is_not_there_is_not_ready() -> None:
    async with TestManager() as manager:
        pass
    async with ClusterClient(manager.url, timeout_s=1.0) as client:
        with pytest.raises(NotReady, match="can't be reached"):
            await client.workers()

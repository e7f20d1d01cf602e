"""The manager among processes of the first release and of later ones, and the client of a manager of the first."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from pydantic import BaseModel, ValidationError

import tests.first_release.cluster_api as first
from pdserve.cluster_api import WorkerInfo, WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.cluster_versions import API_HEADER, FIRST_VERSION, to_json
from pdserve.errors import RequestError, UnknownLease
from pdserve.http import bind, start
from tests.manager import BOOKMARK_INTERVAL_S, Replica, TestManager, until, worker


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[TestManager]:
    uri = "memory://" if request.param == "memory" else request.getfixturevalue("etcd_server").uri
    async with TestManager(uri=uri, name=uuid.uuid4().hex, inactive_timeout_sec=30) as running:
        yield running


def first_info(worker_id: str) -> first.WorkerInfo:
    """What a worker of the first release says of itself."""
    return first.WorkerInfo.model_validate_json(to_json(worker(worker_id), FIRST_VERSION))


LATER = {"colour": "red", "zone": {"name": "a", "rack": 3}}


async def test_what_a_later_worker_tells_is_passed_on_to_who_can_read_it(manager: TestManager) -> None:
    replica = Replica()
    async with ClusterClient(manager.url, bookmark_interval_s=BOOKMARK_INTERVAL_S) as client:
        following = asyncio.create_task(replica.follow(client.watch()))
        await until(lambda: replica.snapshots == 1)
        info = worker("w1", **LATER, sequence=4)
        lease = (await client.register(info)).lease_id
        await until(lambda: "w1" in replica.workers)
        assert replica.workers["w1"].info == info
        await client.drain("w1")
        assert (await client.heartbeat("w1", lease, "1", WorkerLoad())).state == "draining"
        [record] = (await client.workers()).workers
        assert (record.info, record.state) == (info, "draining")
        assert record.info.model_dump().items() >= LATER.items()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_processes_of_the_first_release_read_every_answer_and_every_key(manager: TestManager) -> None:
    async with ClusterClient(manager.url) as client, aiohttp.ClientSession(manager.url) as session:
        await client.register(worker("new", **LATER, sequence=4))

        async def said(method: str, path: str, reply: type[BaseModel], body: BaseModel | None = None) -> Any:
            data = None if body is None else body.model_dump_json()
            headers = {"Content-Type": "application/json"}
            async with session.request(method, path, data=data, headers=headers) as response:
                assert response.status == 200
                return reply.model_validate_json(await response.read())

        info = first_info("old")
        registered = await said("POST", "/v1/workers", first.RegisterReply, first.RegisterRequest(info=info))
        beat = first.HeartbeatRequest(lease_id=registered.lease_id, incarnation="1", load=first.WorkerLoad(running=7))
        assert (await said("POST", "/v1/workers/old/heartbeat", first.HeartbeatReply, beat)).state == "ready"
        assert (await said("POST", "/v1/workers/old/drain", first.WorkerRecord)).state == "draining"
        listed = await said("GET", "/v1/workers", first.WorkerList)
        assert {each.info.worker_id: each.load.running for each in listed.workers} == {"new": 0, "old": 7}
        assert (await said("GET", "/v1/cluster", first.ClusterStatus)).context_servers.draining == 1
        async with session.get("/v1/watch") as answer:
            snapshot = first.WatchEvent.model_validate_json(await answer.content.readline())
            assert {each.info.worker_id for each in snapshot.workers or []} == {"new", "old"}
            await client.register(worker("new", "2", **LATER, sequence=5))
            event = first.WatchEvent.model_validate_json(await answer.content.readline())
            while event.type == "bookmark":
                event = first.WatchEvent.model_validate_json(await answer.content.readline())
            assert (event.worker_id, event.type) == ("new", "put")
        entries, _ = await manager.store.scan(f"/{manager.config.cluster_name}/workers/")
        assert [first.StoredWorker.model_validate_json(entry.value).record.info.worker_id for entry in entries] == [
            "new",
            "old",
        ]


async def test_what_a_manager_of_the_first_release_wrote_is_read(manager: TestManager) -> None:
    lease = await manager.store.grant(30)
    info = first_info("w1")
    load = first.WorkerLoad(running=3)
    stored = first.StoredWorker(lease_id=lease, record=first.WorkerRecord(info=info, state="ready", load=load))
    key = f"/{manager.config.cluster_name}/workers/w1"
    await manager.store.put(key, stored.model_dump_json().encode(), lease)
    async with ClusterClient(manager.url) as client:
        assert [record.info for record in (await client.workers()).workers] == [worker("w1")]
        assert (await client.heartbeat("w1", lease, "1", WorkerLoad())).state == "ready"
        await client.register(worker("w1", "2", sequence=1))
        with pytest.raises(UnknownLease):
            await client.heartbeat("w1", lease, "1", WorkerLoad())


class FirstManager:
    """A manager that refuses what the first release did not know. `said` are the bodies that it was sent."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    async def register(self, request: web.Request) -> web.Response:
        return await self._answer(
            request, first.RegisterRequest, {"lease_id": "1", "ttl_s": 10, "heartbeat_interval_s": 2}
        )

    async def heartbeat(self, request: web.Request) -> web.Response:
        return await self._answer(request, first.HeartbeatRequest, {"state": "ready", "ttl_s": 10})

    async def _answer(self, request: web.Request, model: type[BaseModel], reply: dict[str, Any]) -> web.Response:
        try:
            self.said.append(model.model_validate_json(await request.read()))
        except ValidationError as error:
            fields = {"code": "invalid_request", "message": str(error), "param": None}
            return web.json_response({"error": fields}, status=400)
        return web.json_response(reply)


@asynccontextmanager
async def first_manager() -> AsyncIterator[tuple[FirstManager, str]]:
    manager, app, listener = FirstManager(), web.Application(), bind("127.0.0.1", 0)
    app.router.add_post("/v1/workers", manager.register)
    app.router.add_post("/v1/workers/{worker_id}/heartbeat", manager.heartbeat)
    runner = await start(app, listener)
    yield manager, f"http://127.0.0.1:{listener.getsockname()[1]}"
    await runner.cleanup()


async def test_a_worker_registers_with_a_manager_of_the_first_release() -> None:
    async with first_manager() as (manager, url), ClusterClient(url) as client:
        assert (await client.register(worker("w1", **LATER, sequence=4))).lease_id == "1"
        assert (await client.heartbeat("w1", "1", "1", WorkerLoad(running=2))).state == "ready"
        register, beat = manager.said
        assert (register.info.worker_id, beat.load.running) == ("w1", 2)


async def test_a_mistake_is_told_once_by_a_manager_that_reads_all_fields() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        broken = WorkerInfo.model_construct(**{**dict(worker("w1")), "role": "both"})
        with pytest.raises(RequestError) as caught:
            await client.register(broken)
        assert caught.value.param == "info.role"
        async with aiohttp.ClientSession() as session, session.get(f"{manager.url}/metrics") as answer:
            assert answer.headers[API_HEADER] == "2"
            assert 'requests_total{route="/v1/workers",status="400"} 1.0' in await answer.text()

"""`GET /v1/watch` and the client's `watch`: nothing lost, nothing twice, whatever happens in between."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from cluster_manager.registry import Registry
from cluster_manager.store import MemoryStore
from pdserve.cluster_api import WatchEvent, WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.errors import PdserveError
from pdserve.http import bind, start
from tests.manager import BOOKMARK_INTERVAL_S, Replica, TestManager, until, worker


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def manager(request: pytest.FixtureRequest) -> AsyncIterator[TestManager]:
    uri = "memory://" if request.param == "memory" else request.getfixturevalue("etcd_server").uri
    async with TestManager(uri=uri, name=uuid.uuid4().hex, inactive_timeout_sec=30) as running:
        yield running


@pytest.fixture
async def client(manager: TestManager) -> AsyncIterator[ClusterClient]:
    async with ClusterClient(manager.url, bookmark_interval_s=BOOKMARK_INTERVAL_S) as made:
        yield made


async def read(manager: TestManager, count: int, **query: Any) -> list[WatchEvent]:
    """The first lines of a plain watch stream."""
    async with aiohttp.ClientSession() as session, session.get(f"{manager.url}/v1/watch", params=query) as answer:
        assert answer.status == 200
        async with asyncio.timeout(5):
            return [WatchEvent.model_validate_json(await answer.content.readline()) for _ in range(count)]


async def test_a_stream_starts_with_a_snapshot_and_follows(client: ClusterClient) -> None:
    first = await client.register(worker("w1"))
    replica = Replica()
    following = asyncio.create_task(replica.follow(client.watch()))
    await until(lambda: "w1" in replica.workers)
    assert client.connected
    await client.register(worker("w2"))
    await client.drain("w2")
    await client.deregister("w1", first.lease_id)
    await until(lambda: list(replica.workers) == ["w2"])
    kinds = [event.type for event in replica.seen if event.type != "bookmark"]
    assert kinds == ["snapshot", "put", "put", "delete"]
    assert replica.workers["w2"].state == "draining"
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert not client.connected


async def test_silence_is_broken_by_bookmarks(manager: TestManager) -> None:
    started = time.monotonic()
    events = await read(manager, 4)
    assert [event.type for event in events] == ["snapshot", "bookmark", "bookmark", "bookmark"]
    assert 3 * BOOKMARK_INTERVAL_S * 0.9 <= time.monotonic() - started < 3 * BOOKMARK_INTERVAL_S + 1
    revisions = [event.revision for event in events]
    assert revisions == sorted(revisions)


async def test_a_resumed_stream_starts_where_the_reader_was(manager: TestManager, client: ClusterClient) -> None:
    [snapshot] = await read(manager, 1)
    for index in range(3):
        await client.register(worker(f"w{index}"))
    resumed = await read(manager, 4, from_revision=snapshot.revision + 1, epoch=snapshot.epoch)
    assert [event.type for event in resumed] == ["bookmark", "put", "put", "put"]
    assert [event.worker_id for event in resumed[1:]] == ["w0", "w1", "w2"]
    again = await read(manager, 2, from_revision=resumed[2].revision + 1)
    assert [event.worker_id for event in again] == [None, "w2"], "without an epoch, the reader is trusted"
    other = await read(manager, 1, from_revision=snapshot.revision + 1, epoch="another life")
    assert other[0].type == "snapshot"
    assert len(other[0].workers or []) == 3


async def test_a_watcher_is_told_when_a_worker_lapses() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        await client.register(worker("w1"))
        [event] = [e for e in await read(manager, 8) if e.type == "delete"]
        assert event.worker_id == "w1"


async def test_churn_with_breaking_connections_ends_in_the_same_view(
    manager: TestManager, client: ClusterClient
) -> None:
    """Readers whose connections are cut at random end with what the manager lists, without a gap or a repetition."""
    rng = random.Random(11)
    replicas = [Replica() for _ in range(4)]
    connectors = [aiohttp.TCPConnector() for _ in replicas]
    sessions = [aiohttp.ClientSession(connector=connector) for connector in connectors]
    readers = [ClusterClient(manager.url, session) for session in sessions]
    following = [
        asyncio.create_task(replica.follow(reader.watch())) for replica, reader in zip(replicas, readers, strict=True)
    ]
    leases: dict[str, str] = {}

    async def churn(own: str) -> None:
        for step in range(25):
            name = f"{own}-{rng.randrange(3)}"
            choice = rng.random()
            try:
                if name not in leases or choice < 0.3:
                    leases[name] = (await client.register(worker(name, f"{step}"))).lease_id
                elif choice < 0.5:
                    await client.deregister(name, leases.pop(name))
                elif choice < 0.7:
                    await client.drain(name)
                else:
                    record = next(r for r in (await client.workers()).workers if r.info.worker_id == name)
                    load = WorkerLoad(running=step)
                    await client.heartbeat(name, leases[name], record.info.incarnation, load)
            except PdserveError as error:
                pytest.fail(f"{name}: {error}")
            await asyncio.sleep(rng.random() * 0.01)

    async def cut() -> int:
        cuts = 0
        for _ in range(12):
            await asyncio.sleep(0.05)
            for connection in list(rng.choice(connectors)._acquired):
                if connection.transport:
                    connection.transport.abort()
                    cuts += 1
        return cuts

    async with asyncio.timeout(60):
        cuts, *_ = await asyncio.gather(cut(), *(churn(name) for name in "abcd"))
        assert cuts > 2
        listed = await client.workers()
        expected = {record.info.worker_id: record.model_copy(update={"load": None}) for record in listed.workers}
        # Not the listed revision: others write to the same store, and a stream is where its own last change was.
        await until(lambda: all(replica.workers == expected for replica in replicas))
    assert sum(replica.snapshots for replica in replicas) == len(replicas), "resumed, not started over"
    assert sum(replica.seen.count(replica.seen[0]) for replica in replicas) == len(replicas)
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    for session in sessions:
        await session.close()


async def test_a_slow_reader_holds_back_nobody_and_gets_a_snapshot() -> None:
    """One reader stops reading; the other sees everything at once; the slow one starts over when it reads again."""
    async with TestManager(MemoryStore(history_events=64), inactive_timeout_sec=60) as manager:
        registry = Registry(manager.store, "test", 60)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(slow, ("127.0.0.1", manager.port))
        await loop.sock_sendall(slow, b"GET /v1/watch HTTP/1.0\r\n\r\n")
        async with ClusterClient(manager.url) as client:
            quick, behind = Replica(), Replica()
            following = asyncio.create_task(quick.follow(client.watch()))
            await until(lambda: quick.snapshots == 1)
            for index in range(400):
                await registry.register(worker(f"w{index % 8}", f"{index}", device="x" * 30_000))
                if index % 8 == 7:  # well within the history
                    revision = (await registry.workers()).revision
                    await until(lambda wanted=revision: quick.revision >= wanted, limit_s=2)
            assert quick.snapshots == 1

            rest = b""
            async with asyncio.timeout(20):
                while behind.workers != quick.workers:
                    *lines, rest = (rest + await loop.sock_recv(slow, 1 << 20)).split(b"\n")
                    for line in lines:
                        if line.startswith(b"{"):
                            behind.apply(WatchEvent.model_validate_json(line))
            assert behind.snapshots == 2
            assert len(behind.seen) < 400
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        slow.close()


async def test_stopping_does_not_wait_for_watchers() -> None:
    async with aiohttp.ClientSession() as session:
        async with TestManager() as manager:
            answer = await session.get(f"{manager.url}/v1/watch")
            await answer.content.readline()
            started = time.monotonic()
        assert time.monotonic() - started < 1.0
        await answer.content.read()  # ends in order, not with a reset


async def test_a_restarted_memory_manager_sends_a_new_snapshot() -> None:
    """Its revisions start over and pass the reader's: only the epoch tells the two lives apart."""
    async with TestManager(inactive_timeout_sec=30) as old:
        client = ClusterClient(old.url, bookmark_interval_s=BOOKMARK_INTERVAL_S)
        replica = Replica()
        following = asyncio.create_task(replica.follow(client.watch()))
        await client.register(worker("old"))
        await until(lambda: "old" in replica.workers)
    await until(lambda: not client.connected)
    async with TestManager(inactive_timeout_sec=30, port=old.port) as new:
        registry = Registry(new.store, "test", 30)
        await registry.epoch()
        for index in range(5):
            await registry.register(worker(f"new{index}"))
        await until(lambda: replica.snapshots >= 2)
        await until(lambda: set(replica.workers) == {f"new{index}" for index in range(5)})
        assert "old" not in replica.workers
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await client.close()


async def test_a_silent_connection_counts_as_dead() -> None:
    """A peer that accepts, sends a snapshot and then nothing is left after three bookmark intervals."""
    visits: list[dict[str, str]] = []

    async def watch(request: web.Request) -> web.StreamResponse:
        visits.append(dict(request.query))
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(json.dumps({"type": "snapshot", "revision": 7, "workers": [], "epoch": "e"}).encode())
        await response.write(b'\n{"type": "put", "revision": 8')  # half a line is no event
        await asyncio.sleep(60)
        return response

    app = web.Application()
    app.router.add_get("/v1/watch", watch)
    listener = bind("127.0.0.1", 0)
    runner = await start(app, listener)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with ClusterClient(url, bookmark_interval_s=0.1) as client, aclosing(client.watch()) as events:
        await anext(events)
        started = time.monotonic()
        async with asyncio.timeout(5):
            await anext(events)
        assert 0.25 <= time.monotonic() - started < 2
    await runner.cleanup()
    assert visits[:2] == [{}, {"from_revision": "8", "epoch": "e"}]

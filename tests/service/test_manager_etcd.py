"""Managers over a real etcd that crashes, hangs, loses its data or wants a password."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import aiohttp
import pytest

from cluster_manager.compaction import Compactor
from cluster_manager.store import Compacted, Confirmed, Event, StoreError
from pdserve.cluster_api import WatchEvent, WorkerLoad
from pdserve.cluster_client import ClusterClient
from tests.etcd_server import EtcdServer, etcd_members, etcd_store, find_etcd
from tests.manager import BOOKMARK_INTERVAL_S, Replica, TestManager, until, worker

pytestmark = pytest.mark.etcd


def reader(manager: TestManager) -> ClusterClient:
    return ClusterClient(manager.url, bookmark_interval_s=BOOKMARK_INTERVAL_S)


async def status_of(url: str) -> tuple[int, str | None]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, answer.headers.get("Retry-After")


async def test_a_time_below_etcds_minimum_is_kept(etcd_server: EtcdServer) -> None:
    """etcd raises a lease of 1 s to 2 s; the store ends it after the time that was asked for."""
    async with etcd_store(etcd_server.endpoint) as store:
        lease = await store.grant(1.0)
        await store.put("brief", b"", lease)

        async def gone() -> bool:
            return await store.get("brief") is None

        took_s = await until(gone)
        assert 0.8 <= took_s < 1.9


async def test_two_managers_share_one_truth(etcd_server: EtcdServer) -> None:
    """What is written through one is seen through the other, and either answers any worker."""
    async with (
        TestManager(uri=etcd_server.uri, name="shared") as one,
        TestManager(uri=etcd_server.uri, name="shared") as two,
        TestManager(uri=etcd_server.uri, name="apart") as apart,
        reader(one) as first,
        reader(two) as second,
        reader(apart) as third,
    ):
        replica = Replica()
        following = asyncio.create_task(replica.follow(second.watch()))
        lease = (await first.register(worker("w1"))).lease_id
        await until(lambda: "w1" in replica.workers)
        for step in range(15):  # beats through both in turn, for longer than the timeout
            await (first, second)[step % 2].heartbeat("w1", lease, "1", WorkerLoad(running=step))
            await asyncio.sleep(0.1)
        await second.drain("w1")
        assert (await first.heartbeat("w1", lease, "1", WorkerLoad())).state == "draining"
        assert (await third.workers()).workers == []
        await second.deregister("w1", lease)
        await until(lambda: not replica.workers)
        assert replica.snapshots == 1
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_lease_lapses_when_the_manager_that_granted_it_is_gone(etcd_server: EtcdServer) -> None:
    async with TestManager(uri=etcd_server.uri, name="orphan") as one, reader(one) as client:
        await client.register(worker("w1"))
    async with TestManager(uri=etcd_server.uri, name="orphan") as two, reader(two) as client:
        assert len((await client.workers()).workers) == 1

        async def gone() -> bool:
            return not (await client.workers()).workers

        await until(gone, limit_s=4)


async def test_etcd_crashes_and_comes_back(own_etcd_server: EtcdServer) -> None:
    """503 meanwhile; then everything goes on, and an open watch resumes without a snapshot."""
    async with TestManager(uri=own_etcd_server.uri, inactive_timeout_sec=30) as manager, reader(manager) as client:
        lease = (await client.register(worker("w1"))).lease_id
        replica = Replica()
        following = asyncio.create_task(replica.follow(client.watch()))
        await until(lambda: "w1" in replica.workers)
        await asyncio.to_thread(own_etcd_server.kill)

        started = time.monotonic()
        with pytest.raises(StoreError) as caught:
            await client.heartbeat("w1", lease, "1", WorkerLoad(running=1))
        assert (caught.value.status, caught.value.retryable) == (503, False)
        assert time.monotonic() - started < 3
        for path in ("/health", "/v1/workers", "/v1/cluster", "/v1/watch"):
            assert await status_of(manager.url + path) == (503, "2")
        assert await status_of(manager.url + "/metrics") == (200, None)
        seen = len(replica.seen)
        await until(lambda: not client.connected)
        assert len(replica.seen) == seen, "without the store nobody confirms that a view is current"
        assert "w1" in replica.workers, "the last view stays"

        await asyncio.to_thread(own_etcd_server.start)

        async def healed() -> bool:
            return (await status_of(f"{manager.url}/health"))[0] == 200

        assert await until(healed) < 5
        assert (await client.heartbeat("w1", lease, "1", WorkerLoad(running=2))).state == "ready"
        await client.register(worker("w2"))
        await until(lambda: set(replica.workers) == {"w1", "w2"})
        assert [record.load for record in (await client.workers()).workers] == [WorkerLoad(running=2), None]
        assert replica.snapshots == 1
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_etcd_comes_back_without_its_data(own_etcd_server: EtcdServer) -> None:
    """The open watch notices that revisions started over, and starts over itself."""
    async with TestManager(uri=own_etcd_server.uri, inactive_timeout_sec=30) as manager, reader(manager) as client:
        replica = Replica()
        following = asyncio.create_task(replica.follow(client.watch()))
        for index in range(3):
            await client.register(worker(f"old{index}"))
        await until(lambda: len(replica.workers) == 3)
        await asyncio.to_thread(own_etcd_server.kill)
        own_etcd_server.wipe()
        await asyncio.to_thread(own_etcd_server.start)
        await until(lambda: replica.snapshots == 2)
        assert replica.workers == {}
        await client.register(worker("new"))
        await until(lambda: list(replica.workers) == ["new"])
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_manager_starts_without_etcd_and_heals(own_etcd_server: EtcdServer) -> None:
    await asyncio.to_thread(own_etcd_server.kill)
    async with TestManager(uri=own_etcd_server.uri) as manager, reader(manager) as client:
        replica = Replica()
        following = asyncio.create_task(replica.follow(client.watch()))
        assert await status_of(f"{manager.url}/health") == (503, "2")
        assert not client.connected
        await asyncio.to_thread(own_etcd_server.start)
        await until(lambda: replica.snapshots == 1, limit_s=15)
        await client.register(worker("w1"))
        await until(lambda: "w1" in replica.workers)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def test_a_hanging_etcd_bounds_every_call(own_etcd_server: EtcdServer) -> None:
    async with etcd_store(own_etcd_server.endpoint, timeout_s=0.5) as store:
        lease = await store.grant(60)
        own_etcd_server.signal(signal.SIGSTOP)
        calls = (
            store.get("k"),
            store.put("k", b""),
            store.keepalive(lease),
            store.grant(5),
            anext(store.watch("k", 1, 5)),
        )
        started = time.monotonic()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreError] * 5
        assert time.monotonic() - started < 2
        own_etcd_server.signal(signal.SIGCONT)

        async def answers_again() -> bool:
            try:
                await store.keepalive(lease)
            except StoreError:
                return False
            return True

        await until(answers_again)


async def test_a_compacted_revision_gives_a_snapshot(own_etcd_server: EtcdServer) -> None:
    async with TestManager(uri=own_etcd_server.uri, inactive_timeout_sec=30) as manager, reader(manager) as client:
        await client.register(worker("w1"))
        revision = (await client.workers()).revision
        for _ in range(3):
            await client.register(worker("w1"))
        etcdctl(own_etcd_server, "compact", str(revision + 2))
        url = f"{manager.url}/v1/watch?from_revision={revision}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer, asyncio.timeout(5):
            events = [WatchEvent.model_validate_json(await answer.content.readline()) for _ in range(4)]
        [snapshot] = [event for event in events if event.type != "bookmark"]
        assert snapshot.type == "snapshot"
        assert snapshot.revision == (await client.workers()).revision


async def test_another_endpoint_takes_over(own_etcd_server: EtcdServer) -> None:
    """The first endpoint refuses connections; the second is a name, not an address."""
    dead = EtcdServer(Path("unused"))
    async with etcd_store(dead.endpoint, f"localhost:{own_etcd_server.port}") as store, asyncio.timeout(10):
        revision = await store.put("k", b"v")
        async with aclosing(store.watch("k", revision, 5)) as events:
            assert (await anext(events)).value == b"v"


async def test_credentials_are_used_and_renewed(own_etcd_server: EtcdServer) -> None:
    """A restarted etcd has forgotten its tokens; calls and watches get a new one by themselves."""
    for command in (["user", "add", "root:secret"], ["user", "grant-role", "root", "root"], ["auth", "enable"]):
        etcdctl(own_etcd_server, *command)
    login = {"user": "root", "password": "secret"}
    async with (
        etcd_store(own_etcd_server.endpoint, **login) as calling,
        etcd_store(own_etcd_server.endpoint, **login) as watching,
    ):
        lease = await calling.grant(60)
        revision = await calling.put("k", b"1", lease)
        assert await watching.get("k") == ("k", b"1", revision)
        await asyncio.to_thread(own_etcd_server.kill)
        await asyncio.to_thread(own_etcd_server.start)

        async def kept() -> bool:
            with contextlib.suppress(StoreError):
                await calling.keepalive(lease)
                return await calling.get("k") is not None
            return False

        async def watched() -> bool:
            with contextlib.suppress(StoreError):
                async with aclosing(watching.watch("k", revision, 5)) as events, asyncio.timeout(2):
                    return (await anext(events)).value == b"1"
            return False

        await until(kept)
        await until(watched)
    for user, password in (("root", "wrong"), (None, None)):
        async with etcd_store(own_etcd_server.endpoint, user=user, password=password) as refused:
            with pytest.raises(StoreError):
                await refused.get("k")


async def first_event(changes: AsyncGenerator[Event | Confirmed, None]) -> int:
    """The revision of the first change; the store may confirm the watch before it has sent that."""
    async with asyncio.timeout(30):
        return await anext(change.revision async for change in changes if isinstance(change, Event))


async def to_its_end(changes: AsyncGenerator[Event | Confirmed, None]) -> list[Event | Confirmed]:
    async with asyncio.timeout(30):
        return [change async for change in changes]


async def test_a_member_that_is_cut_off_ends_its_watches_and_another_goes_on(tmp_path: Path) -> None:
    """Of three members the one that is watched loses the others: it must not go on as if nothing happened there."""
    with etcd_members(tmp_path, 3) as (one, two, three):
        async with etcd_store(one.endpoint) as store:
            revision = await store.put("k", b"1")
            async with aclosing(store.watch("k", revision, 0.1)) as changes:
                assert await first_event(changes) == revision
                assert isinstance(await anext(changes), Confirmed)
                two.signal(signal.SIGSTOP)
                three.signal(signal.SIGSTOP)
                with pytest.raises(StoreError, match=r"no leader|UNAVAILABLE"):
                    await to_its_end(changes)
            with pytest.raises(StoreError):
                await store.get("k")
            for server in (two, three):
                server.signal(signal.SIGCONT)

            async def is_back() -> bool:
                with contextlib.suppress(StoreError):
                    return await store.get("k") is not None
                return False

            await until(is_back, limit_s=30)
        one.signal(signal.SIGSTOP)
        async with etcd_store(one.endpoint, two.endpoint, timeout_s=0.5) as store:

            async def watches() -> bool:
                with contextlib.suppress(StoreError):
                    async with aclosing(store.watch("k", revision, 5)) as changes:
                        return (await anext(changes)).revision == revision
                return False

            await until(watches, limit_s=30)


async def test_a_watch_that_etcd_does_not_answer_ends(own_etcd_server: EtcdServer) -> None:
    async with etcd_store(own_etcd_server.endpoint, timeout_s=0.5) as store:
        revision = await store.put("k", b"1")
        async with aclosing(store.watch("k", revision, 0.1)) as changes:
            assert await first_event(changes) == revision
            own_etcd_server.signal(signal.SIGSTOP)
            with pytest.raises(StoreError, match="no answer"):
                await to_its_end(changes)


async def test_busy_workers_write_no_revisions(own_etcd_server: EtcdServer) -> None:
    """Many heartbeats, each with another load: the store stays as it is. At one write each it grows by 500 a second."""
    async with TestManager(uri=own_etcd_server.uri, inactive_timeout_sec=30) as manager, reader(manager) as client:
        leases = [(await client.register(worker(f"w{number}"))).lease_id for number in range(6)]
        before = (await client.workers()).revision
        for step in range(50):
            beats = [
                client.heartbeat(f"w{number}", lease, "1", WorkerLoad(running=step, waiting=number))
                for number, lease in enumerate(leases)
            ]
            await asyncio.gather(*beats)
        listed = await client.workers()
        assert listed.revision == before
        assert [record.load for record in listed.workers] == [WorkerLoad(running=49, waiting=n) for n in range(6)]


async def test_the_history_is_kept_short_by_one_of_the_managers(own_etcd_server: EtcdServer) -> None:
    """Each interval's changes are forgotten an interval later; who watches goes on, and who comes late starts over."""
    async with etcd_store(own_etcd_server.endpoint) as one, etcd_store(own_etcd_server.endpoint) as two:
        oldest = await one.put("/c/workers/w", b"0")
        tasks = [asyncio.create_task(Compactor(store, "c", 0.3).run()) for store in (one, two)]
        seen: list[int] = []

        async def follow() -> None:
            async with aclosing(one.watch("/c/workers/", oldest, 60)) as changes:
                async for event in changes:
                    seen.append(event.revision)  # noqa: PERF401 - it has no end

        following = asyncio.create_task(follow())
        written = [oldest]

        async def is_compacted() -> bool:
            written.append(await two.put("/c/workers/w", b"%d" % len(written)))
            try:
                async with aclosing(two.watch("/c/workers/", oldest, 60)) as changes:
                    await anext(changes)
            except Compacted:
                return True
            return False

        await until(is_compacted, limit_s=30)
        await until(lambda: seen == written)
        # Nothing happens any more: after two marks at most, none is written.
        revision = -1
        for _ in range(50):
            (_, now), previous = await one.scan("/"), revision
            revision = now
            await asyncio.sleep(0.7)
            if now == previous:
                break
        assert (await one.scan("/"))[1] == revision
        for task in (*tasks, following):
            task.cancel()
        await asyncio.gather(*tasks, following, return_exceptions=True)


def etcdctl(server: EtcdServer, *arguments: str) -> None:
    binary = Path(find_etcd() or "etcd").with_name("etcdctl")
    environment = {**os.environ, "ETCDCTL_API": "3"}
    command = [str(binary), f"--endpoints={server.endpoint}", *arguments]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=20)

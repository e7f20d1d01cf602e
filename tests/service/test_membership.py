"""A worker's membership through everything that can happen to its manager."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from cluster_manager.registry import Registry
from pdserve.cluster_api import WorkerInfo, WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.worker.membership import Membership
from tests.etcd_server import EtcdServer
from tests.manager import Replica, TestManager, until, worker


class Member:
    """A worker that is nothing but a membership."""

    def __init__(self, client: ClusterClient, worker_id: str = "w1") -> None:
        self.worker_id = worker_id
        self.incarnations: list[str] = []
        self.drained = 0
        self.load: WorkerLoad | None = WorkerLoad()
        self.membership = Membership(client, self._make_info, lambda: self.load, self._drain)

    def _make_info(self, incarnation: str) -> WorkerInfo:
        self.incarnations.append(incarnation)
        return worker(self.worker_id, incarnation)

    def _drain(self) -> None:
        self.drained += 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        task = asyncio.create_task(self.membership.run())
        yield task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def listed(client: ClusterClient) -> list[str]:
    return [record.info.worker_id for record in (await client.workers()).workers]


async def test_it_registers_beats_tells_its_load_and_leaves() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running() as task:
            await until(lambda: member.membership.registered)
            member.load = WorkerLoad(running=4)
            await asyncio.sleep(1.5)  # longer than the timeout
            [record] = (await client.workers()).workers
            assert record.load.running == 4
            assert member.incarnations == [record.info.incarnation]
            await member.membership.leave()
            assert await listed(client) == []
            await asyncio.wait_for(task, 1)
            await member.membership.leave()


async def test_a_request_to_drain_arrives_once() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running():
            await until(lambda: member.membership.registered)
            await client.drain("w1")
            await until(lambda: member.drained == 1, limit_s=1)
            await asyncio.sleep(0.3)
            assert member.drained == 1


async def test_a_draining_worker_that_had_to_register_again_is_draining_still() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running():
            await until(lambda: member.membership.registered)
            await client.drain("w1")
            await until(lambda: member.drained == 1)
            await manager.store.delete("/test/workers/w1")

            async def draining_again() -> bool:
                records = (await client.workers()).workers
                return len(member.incarnations) == 2 and [r.state for r in records] == ["draining"]

            await until(draining_again, limit_s=2)
            assert member.drained == 1


async def test_a_worker_that_can_not_serve_sends_no_heartbeat_until_it_can() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running():
            await until(lambda: member.membership.registered)
            member.load = None

            async def gone() -> bool:
                return await listed(client) == []

            await until(gone, limit_s=5)
            member.load = WorkerLoad(running=2)
            await until(lambda: len(member.incarnations) == 2)
            await until(lambda: member.membership.registered)
            assert await listed(client) == ["w1"]


async def test_a_lost_lease_gives_a_new_incarnation() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running():
            await until(lambda: member.membership.registered)
            await manager.store.delete("/test/workers/w1")
            await until(lambda: len(member.incarnations) == 2)
            await until(lambda: member.membership.registered)
            assert (await client.workers()).workers[0].info.incarnation == member.incarnations[1]
            assert member.incarnations[0] != member.incarnations[1]


async def test_a_restarted_memory_manager_learns_its_workers_within_a_heartbeat() -> None:
    async with TestManager() as old:
        client = ClusterClient(old.url, timeout_s=1.0)
        member, other = Member(client), Member(client, "w2")
        replica = Replica()
        following = asyncio.create_task(replica.follow(client.watch()))
        running, also = member.running(), other.running()
        task = await running.__aenter__()
        await also.__aenter__()
        await until(lambda: set(replica.workers) == {"w1", "w2"})
    await asyncio.sleep(0.5)
    assert not task.done(), "an outage ends nobody"
    async with TestManager(port=old.port):
        await until(lambda: len(member.incarnations) == 2 and len(other.incarnations) == 2, limit_s=2)
        await until(lambda: replica.snapshots == 2 and set(replica.workers) == {"w1", "w2"})
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        for worker_running in (running, also):
            await worker_running.__aexit__(None, None, None)
        await client.close()


@pytest.mark.etcd
async def test_a_manager_restarted_over_etcd_goes_on_with_the_same_leases(etcd_server: EtcdServer) -> None:
    options = {"uri": etcd_server.uri, "name": "restart", "inactive_timeout_sec": 5}
    async with TestManager(**options) as old:
        client = ClusterClient(old.url, timeout_s=1.0)
        member = Member(client)
        running = member.running()
        await running.__aenter__()
        await until(lambda: member.membership.registered)
    async with TestManager(**options, port=old.port):
        member.load = WorkerLoad(running=7)

        async def beats() -> bool:
            return [record.load for record in (await client.workers()).workers] == [WorkerLoad(running=7)]

        await until(beats)
        assert len(member.incarnations) == 1
        await member.membership.leave()
        await running.__aexit__(None, None, None)
        await client.close()


async def test_it_waits_for_a_manager_that_starts_later() -> None:
    async with TestManager() as early:
        pass
    async with ClusterClient(early.url, timeout_s=1.0) as client:
        member = Member(client)
        async with member.running():
            await asyncio.sleep(0.4)
            assert not member.membership.registered
            async with TestManager(port=early.port):
                await until(lambda: member.membership.registered)
                await member.membership.leave()


async def test_leaving_is_bounded_and_silent_when_the_manager_is_gone() -> None:
    async with TestManager() as manager:
        client = ClusterClient(manager.url, timeout_s=1.0)
        member = Member(client)
        running = member.running()
        task = await running.__aenter__()
        await until(lambda: member.membership.registered)
    started = time.monotonic()
    await member.membership.leave()
    assert time.monotonic() - started < 3.5
    await asyncio.wait_for(task, 1)
    await running.__aexit__(None, None, None)
    await client.close()


async def test_leaving_after_cancellation_still_deregisters() -> None:
    async with TestManager(inactive_timeout_sec=60) as manager, ClusterClient(manager.url) as client:
        member = Member(client)
        async with member.running() as task:
            await until(lambda: member.membership.registered)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await member.membership.leave()
            assert await listed(client) == []


async def test_two_workers_of_one_name_do_not_both_stand() -> None:
    """The later registration holds; the registry never mixes the two."""
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        registry = Registry(manager.store, "test", 1.0)
        first = await registry.register(worker("w1", "a"))
        await registry.register(worker("w1", "b"))
        await manager.store.revoke(first)
        assert [record.info.incarnation for record in (await client.workers()).workers] == ["b"]

"""The registry's compare-and-swap, with the interleavings that seldom come by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cluster_manager.registry import Registry
from cluster_manager.store import Entry, MemoryStore
from pdserve.cluster_api import HeartbeatRequest, WorkerLoad
from pdserve.errors import UnknownLease
from tests.manager import worker


class Interleaved(MemoryStore):
    """A store in which something else happens right after a read, once."""

    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def get(self, key: str) -> Entry | None:
        entry = await super().get(key)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            await meanwhile()
        return entry


@pytest.fixture
def store() -> Interleaved:
    return Interleaved()


@pytest.fixture
def registry(store: Interleaved) -> Registry:
    return Registry(store, "test", 60)


async def test_a_drain_between_a_heartbeats_read_and_write_is_kept(store: Interleaved, registry: Registry) -> None:
    lease = await registry.register(worker("w1"))
    store.meanwhile = lambda: registry.drain("w1")
    beat = HeartbeatRequest(lease_id=lease, incarnation="1", load=WorkerLoad(running=5))
    assert (await registry.heartbeat("w1", beat)).state == "draining"
    record = await registry.worker("w1")
    assert (record.state, record.load.running) == ("draining", 5)
    await store.close()


async def test_a_registration_in_the_middle_of_a_heartbeat_is_not_overwritten(
    store: Interleaved, registry: Registry
) -> None:
    lease = await registry.register(worker("w1", "old"))
    store.meanwhile = lambda: registry.register(worker("w1", "new"))
    beat = HeartbeatRequest(lease_id=lease, incarnation="old", load=WorkerLoad(running=5))
    with pytest.raises(UnknownLease):
        await registry.heartbeat("w1", beat)
    assert (await registry.worker("w1")).info.incarnation == "new"
    await store.close()


async def test_a_registration_in_the_middle_of_a_deregistration_stays(store: Interleaved, registry: Registry) -> None:
    lease = await registry.register(worker("w1", "old"))
    store.meanwhile = lambda: registry.register(worker("w1", "new"))
    await registry.deregister("w1", lease)
    assert (await registry.worker("w1")).info.incarnation == "new"
    await store.close()


async def test_what_another_version_wrote_hides_nobody(store: Interleaved, registry: Registry) -> None:
    await registry.register(worker("w1"))
    await store.put("/test/workers/w0", b"not a worker")
    assert [record.info.worker_id for record in (await registry.workers()).workers] == ["w1"]
    await registry.register(worker("w0"))
    assert len((await registry.workers()).workers) == 2
    await store.close()

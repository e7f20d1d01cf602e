"""The registry's compare-and-swap, with the interleavings that seldom come by themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cluster_manager.loads import Loads
from cluster_manager.registry import Registry
from cluster_manager.store import Entry, MemoryStore
from pdserve.cluster_api import HeartbeatRequest, WorkerLoad
from pdserve.errors import Superseded, UnknownLease
from tests.manager import worker


class Interleaved(MemoryStore):
    """A store in which something else happens right after a read, once. `lost_answers` writes are done and not told."""

    lost_answers = 0

    meanwhile: Callable[[], Awaitable[object]] | None = None

    async def get(self, key: str) -> Entry | None:
        entry = await super().get(key)
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            await meanwhile()
        return entry

    async def put_if(self, key: str, value: bytes, expected_mod_revision: int, lease: str | None = None) -> int | None:
        written = await super().put_if(key, value, expected_mod_revision, lease)
        if self.lost_answers:
            self.lost_answers -= 1
            return await super().put_if(key, value, expected_mod_revision, lease)  # as a client does that hears nothing
        return written


@pytest.fixture
def store() -> Interleaved:
    return Interleaved()


@pytest.fixture
def registry(store: Interleaved) -> Registry:
    return Registry(store, "test", 60)


async def test_a_drain_in_the_middle_of_a_heartbeat_is_kept(store: Interleaved, registry: Registry) -> None:
    lease = await registry.register(worker("w1"))
    store.meanwhile = lambda: registry.drain("w1")
    beat = HeartbeatRequest(lease_id=lease, incarnation="1", load=WorkerLoad(running=5))
    await registry.heartbeat("w1", beat)
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
    await registry.heartbeat("w1", beat)
    with pytest.raises(UnknownLease):
        await registry.heartbeat("w1", beat)
    record = await registry.worker("w1")
    assert (record.info.incarnation, record.load) == ("new", None)
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


@pytest.mark.parametrize(("started_at", "sequence"), [(10.0, 1), (9.0, 7)], ids=["same process", "an older process"])
async def test_a_late_registration_does_not_win_over_a_newer_one(
    store: Interleaved, registry: Registry, started_at: float, sequence: int
) -> None:
    late = worker("w1", "late", started_at=started_at, sequence=sequence)
    new = worker("w1", "new", started_at=10.0, sequence=2)
    lease = await registry.register(new)
    with pytest.raises(Superseded, match="late is older than that of new"):
        await registry.register(late)
    await registry.heartbeat("w1", HeartbeatRequest(lease_id=lease, incarnation="new"))
    assert (await registry.worker("w1")).info == new
    await registry.deregister("w1", lease)
    await registry.register(late)
    await store.close()


async def test_a_newer_registration_in_the_middle_of_a_late_one_stands(store: Interleaved, registry: Registry) -> None:
    await registry.register(worker("w1", "first", sequence=1))
    store.meanwhile = lambda: registry.register(worker("w1", "third", sequence=3))
    with pytest.raises(Superseded):
        await registry.register(worker("w1", "second", sequence=2))
    assert (await registry.worker("w1")).info.incarnation == "third"
    await store.close()


async def test_an_older_registration_in_the_middle_of_a_newer_one_is_replaced(
    store: Interleaved, registry: Registry
) -> None:
    store.meanwhile = lambda: registry.register(worker("w1", "first", sequence=1))
    lease = await registry.register(worker("w1", "second", sequence=2))
    await registry.heartbeat("w1", HeartbeatRequest(lease_id=lease, incarnation="second"))
    entries, _ = await store.scan("/test/workers/")
    assert len(entries) == 1
    await store.close()


async def test_a_registration_whose_answer_the_store_lost_is_made_once(store: Interleaved, registry: Registry) -> None:
    store.lost_answers = 1
    lease = await registry.register(worker("w1", "1", sequence=1))
    await registry.heartbeat("w1", HeartbeatRequest(lease_id=lease, incarnation="1"))
    await store.close()


async def test_loads_are_forgotten_with_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("cluster_manager.loads.time.monotonic", lambda: now_s)
    loads = Loads(keep_s=10)
    for number in range(1000):
        now_s += 0.1
        loads.tell(f"w{number}", "lease", WorkerLoad(running=number))
    assert loads.get("w999", "lease") == WorkerLoad(running=999)
    assert loads.get("w999", "another") is None
    assert loads.get("w1", "lease") is None
    assert len(loads) <= 102
    now_s += 11
    assert loads.get("w999", "lease") is None

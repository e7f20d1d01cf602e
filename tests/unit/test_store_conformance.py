"""What every store must do; the same tests run against memory and a real etcd."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest

from cluster_manager.store import Compacted, Confirmed, Event, LeaseLost, MemoryStore, Store
from tests.etcd_server import etcd_store


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        memory = MemoryStore()
        yield memory
        await memory.close()
    else:
        async with etcd_store(request.getfixturevalue("etcd_server").endpoint) as made:
            yield made


@pytest.fixture
def prefix() -> str:
    return f"/{uuid.uuid4().hex}/"


async def collect(store: Store, prefix: str, from_revision: int, count: int) -> list[Event]:
    events: list[Event] = []
    async with aclosing(store.watch(prefix, from_revision, 60)) as changes, asyncio.timeout(20):
        async for event in changes:
            assert isinstance(event, Event)
            events.append(event)
            if len(events) == count:
                break
    return events


async def gone_after_s(store: Store, key: str, limit_s: float) -> float:
    started = time.monotonic()
    while await store.get(key):
        assert time.monotonic() - started < limit_s, f"{key} is still there after {limit_s} s"
        await asyncio.sleep(0.05)
    return time.monotonic() - started


async def test_what_is_put_is_found_and_what_is_deleted_is_not(store: Store, prefix: str) -> None:
    assert await store.get(prefix + "a") is None
    first = await store.put(prefix + "a", b"1")
    second = await store.put(prefix + "a", b"2")
    assert second > first
    entry = await store.get(prefix + "a")
    assert entry == (prefix + "a", b"2", second)
    assert await store.delete(prefix + "a") is True
    assert await store.delete(prefix + "a") is False
    assert await store.get(prefix + "a") is None


async def test_scan_sees_the_prefix_and_nothing_beside_it(store: Store, prefix: str) -> None:
    await store.put(prefix + "b", b"2")
    await store.put(prefix + "a", b"1")
    await store.put(prefix[:-1] + "0", b"next key after the prefix")
    entries, revision = await store.scan(prefix)
    assert [(entry.key, entry.value) for entry in entries] == [(prefix + "a", b"1"), (prefix + "b", b"2")]
    assert revision >= max(entry.mod_revision for entry in entries)


async def test_put_if_writes_only_over_the_expected_revision(store: Store, prefix: str) -> None:
    key = prefix + "k"
    created = await store.put_if(key, b"1", expected_mod_revision=0)
    assert created is not None
    assert await store.put_if(key, b"x", expected_mod_revision=0) is None
    changed = await store.put_if(key, b"2", expected_mod_revision=created)
    assert changed is not None
    assert changed > created
    assert await store.put_if(key, b"x", expected_mod_revision=created) is None
    await store.delete(key)
    assert await store.put_if(key, b"x", expected_mod_revision=changed) is None
    assert await store.put_if(key, b"3", expected_mod_revision=0) is not None


async def test_concurrent_put_if_loses_no_update(store: Store, prefix: str) -> None:
    key = prefix + "counter"
    await store.put(key, b"0")

    async def increment() -> None:
        while True:
            entry = await store.get(key)
            assert entry is not None
            if await store.put_if(key, b"%d" % (int(entry.value) + 1), entry.mod_revision) is not None:
                return

    async with asyncio.timeout(20):
        await asyncio.gather(*(increment() for _ in range(20)))
    entry = await store.get(key)
    assert entry is not None
    assert entry.value == b"20"


async def test_a_lease_lapses_on_time_and_takes_its_keys(store: Store, prefix: str) -> None:
    revision = await store.put(prefix + "stays", b"")
    lease = await store.grant(1.0)
    await store.put(prefix + "goes", b"", lease)
    assert await gone_after_s(store, prefix + "goes", limit_s=2.5) >= 0.8
    with pytest.raises(LeaseLost):
        await store.keepalive(lease)
    with pytest.raises(LeaseLost):
        await store.put(prefix + "goes", b"", lease)
    assert await store.get(prefix + "stays") is not None
    events = await collect(store, prefix, revision, 3)
    assert [(event.kind, event.key) for event in events[1:]] == [("put", prefix + "goes"), ("delete", prefix + "goes")]


async def test_keepalives_keep_a_lease_beyond_its_time(store: Store, prefix: str) -> None:
    lease = await store.grant(1.0)
    await store.put(prefix + "k", b"", lease)
    for _ in range(12):
        await asyncio.sleep(0.25)
        await store.keepalive(lease)
    assert await store.get(prefix + "k") is not None
    await gone_after_s(store, prefix + "k", limit_s=2.5)


async def test_revoke_deletes_at_once_and_may_be_repeated(store: Store, prefix: str) -> None:
    lease = await store.grant(60)
    await store.put(prefix + "k", b"", lease)
    await store.revoke(lease)
    assert await store.get(prefix + "k") is None
    await store.revoke(lease)


async def test_a_key_belongs_to_the_lease_of_its_last_write(store: Store, prefix: str) -> None:
    old, new = await store.grant(60), await store.grant(60)
    await store.put(prefix + "moved", b"", old)
    await store.put(prefix + "moved", b"", new)
    await store.put(prefix + "freed", b"", old)
    await store.put(prefix + "freed", b"")
    await store.revoke(old)
    assert await store.get(prefix + "moved") is not None
    assert await store.get(prefix + "freed") is not None
    await store.revoke(new)
    assert await store.get(prefix + "moved") is None


@pytest.mark.parametrize("lease", ["", "never granted", "12345", "-1", str(1 << 80)])
async def test_a_lease_that_never_was_is_lost(store: Store, prefix: str, lease: str) -> None:
    with pytest.raises(LeaseLost):
        await store.keepalive(lease)
    with pytest.raises(LeaseLost):
        await store.put(prefix + "k", b"", lease)
    with pytest.raises(LeaseLost):
        await store.put_if(prefix + "k", b"", 0, lease)
    assert await store.get(prefix + "k") is None
    await store.revoke(lease)


async def test_a_watch_starts_inclusively_and_follows(store: Store, prefix: str) -> None:
    await store.put(prefix + "a", b"before")
    wanted = await store.put(prefix + "a", b"1")
    await store.put(prefix[:-1] + "0", b"outside")
    reading = asyncio.create_task(collect(store, prefix, wanted, 3))
    await asyncio.sleep(0.2)
    await store.delete(prefix + "a")
    last = await store.put(prefix + "b", b"2")
    events = await reading
    assert [(event.kind, event.key, event.value) for event in events] == [
        ("put", prefix + "a", b"1"),
        ("delete", prefix + "a", b""),
        ("put", prefix + "b", b"2"),
    ]
    assert [events[0].revision, events[2].revision] == [wanted, last]


async def test_a_watch_of_a_future_that_is_not_next_is_compacted(store: Store, prefix: str) -> None:
    revision = await store.put(prefix + "a", b"")
    with pytest.raises(Compacted):
        await collect(store, prefix, revision + 1000, 1)


async def test_list_then_watch_loses_nothing_and_repeats_nothing(store: Store, prefix: str) -> None:
    """Readers join a churning store at any moment; each ends with the store's own contents."""
    rng = random.Random(7)
    keys = [f"{prefix}{index}" for index in range(8)]
    writing = asyncio.Event()

    async def write() -> None:
        for step in range(120):
            if rng.random() < 0.3:
                await store.delete(rng.choice(keys))
            else:
                await store.put(rng.choice(keys), b"%d" % step)
            writing.set()
            await asyncio.sleep(rng.random() * 0.005)
        await store.put(prefix + "end", b"")

    async def read(delay_s: float) -> dict[str, bytes]:
        await asyncio.sleep(delay_s)
        entries, revision = await store.scan(prefix)
        replica = {entry.key: entry.value for entry in entries}
        async with aclosing(store.watch(prefix, revision + 1, 60)) as changes:
            async for event in changes:
                assert isinstance(event, Event)
                assert event.revision > revision
                revision = event.revision
                if event.kind == "put":
                    replica[event.key] = event.value
                else:
                    del replica[event.key]  # a delete without its put would be a lost event
                if event.key == prefix + "end":
                    break
        return replica

    async with asyncio.timeout(30):
        writer = asyncio.create_task(write())
        await writing.wait()
        replicas = await asyncio.gather(*(read(0.02 * index) for index in range(8)))
        await writer
    entries, _ = await store.scan(prefix)
    assert all(replica == {entry.key: entry.value for entry in entries} for replica in replicas)


async def test_an_abandoned_watch_leaves_the_store_usable(store: Store, prefix: str) -> None:
    reading = asyncio.create_task(collect(store, prefix, (await store.scan(prefix))[1] + 1, 1))
    await asyncio.sleep(0.1)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    revision = await store.put(prefix + "a", b"1")
    assert (await collect(store, prefix, revision, 1))[0].value == b"1"


async def test_a_silent_watch_is_confirmed_and_loses_nothing_by_it(store: Store, prefix: str) -> None:
    revision = await store.put(prefix + "a", b"1")
    async with aclosing(store.watch(prefix, revision, 0.05)) as changes, asyncio.timeout(20):
        # A store may answer before it has sent what is old: then the watch has not come that far.
        first = [each async for each in _until_event(changes)]
        assert all(each.revision < revision for each in first[:-1])
        assert first[-1].revision == revision
        seen = [await anext(changes) for _ in range(2)]
        assert [type(each) for each in seen] == [Confirmed, Confirmed]
        assert all(each.revision >= revision for each in seen)
        last = await store.put(prefix + "a", b"2")
        confirmed = [each async for each in _until_event(changes)]
        assert (confirmed[-1].revision, {type(each) for each in confirmed[:-1]} <= {Confirmed}) == (last, True)
        assert all(each.revision < last for each in confirmed[:-1]), "an event is never said to be seen before it is"


async def _until_event(changes: AsyncGenerator[Event | Confirmed, None]) -> AsyncIterator[Event | Confirmed]:
    async for each in changes:
        yield each
        if isinstance(each, Event):
            return


async def test_what_is_before_a_compaction_is_gone_and_the_rest_is_there(store: Store, prefix: str) -> None:
    first = await store.put(prefix + "a", b"1")
    await store.put(prefix + "a", b"2")
    mark = await store.put(prefix[:-1] + "-mark", b"")
    last = await store.put(prefix + "b", b"3")
    await store.compact(mark)
    await store.compact(first)  # done already
    with pytest.raises(Compacted):
        await collect(store, prefix, first, 1)
    assert [event.revision for event in await collect(store, prefix, mark, 1)] == [last]
    entries, _ = await store.scan(prefix)
    assert [entry.value for entry in entries] == [b"2", b"3"], "keys stay, whenever they were written"

"""Waiting for marks of a device that is a script: it says when each is reached."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import pytest

from kv_transfer.mark_poller import SPIN_S, MarkPoller, is_reached


@dataclass
class Event:
    """Reached at `at_s`; fails instead if it is to."""

    at_s: float = 0.0
    failure: str = ""
    queries: int = 0

    def query(self) -> bool:
        self.queries += 1
        if self.failure:
            raise RuntimeError(self.failure)
        return time.monotonic() >= self.at_s


def after(seconds: float) -> Event:
    return Event(time.monotonic() + seconds)


async def reached(poller: MarkPoller, event: Event | None, soon: bool = False) -> Exception | None:
    done: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    poller.when(event, done.set_result, soon)
    return await asyncio.wait_for(done, 5.0)


@pytest.fixture
async def poller() -> MarkPoller:
    return MarkPoller(asyncio.get_running_loop(), spins=True)


@pytest.mark.parametrize("event", [None, Event()])
async def test_what_is_reached_is_told_at_once(poller: MarkPoller, event: Event | None) -> None:
    told: list[Exception | None] = []
    poller.when(event, told.append)
    assert told == [None]


@pytest.mark.parametrize("soon", [True, False])
async def test_a_mark_is_told_once_it_is_reached(poller: MarkPoller, soon: bool) -> None:
    event = after(0.02)
    assert await reached(poller, event, soon) is None
    assert time.monotonic() >= event.at_s
    queries = event.queries
    await asyncio.sleep(0.01)
    assert event.queries == queries, "nobody asks on"


async def test_a_device_that_fails_is_reported_and_what_follows_one_mark_harms_no_other(poller: MarkPoller) -> None:
    def fail(_: Exception | None) -> None:
        raise ValueError("what follows")

    poller.when(after(0.005), fail)
    other = asyncio.create_task(reached(poller, after(0.01)))
    broken = Event(failure="an illegal address")
    assert str(await reached(poller, broken, soon=True)) == "an illegal address"
    assert await other is None


def test_whether_a_mark_is_reached_is_not_known_of_a_device_that_has_failed() -> None:
    assert is_reached(None)
    assert is_reached(Event())
    assert not is_reached(after(60.0))
    assert not is_reached(Event(failure="an illegal address"))


async def test_only_what_should_be_soon_is_asked_for_without_a_pause(poller: MarkPoller) -> None:
    slow, quick = after(0.02), after(SPIN_S / 2)
    waiting = asyncio.create_task(reached(poller, slow))
    await asyncio.sleep(0.005)
    assert 2 <= slow.queries <= 8, "about each millisecond"
    queries = slow.queries
    assert await reached(poller, quick, soon=True) is None, "which ends the sleep"
    assert slow.queries - queries >= quick.queries - 1
    await waiting
    assert slow.queries < 2000


async def test_it_stays_awake_for_what_is_due_and_no_longer(poller: MarkPoller) -> None:
    owner, event = object(), after(60.0)
    poller.when(event, lambda _: None)
    poller.stay_awake(owner, 0.001, late_s=0.001)
    await asyncio.sleep(0.02)
    awake = event.queries
    assert awake > 8
    await asyncio.sleep(0.02)
    asleep = event.queries - awake
    assert asleep <= 21
    poller.stay_awake(owner, 0.001, late_s=10.0)
    poller.rest(owner)
    before = event.queries
    await asyncio.sleep(0.02)
    assert event.queries - before <= 23


async def test_where_nothing_is_quick_nobody_stays_awake() -> None:
    poller, event = MarkPoller(asyncio.get_running_loop(), spins=False), after(60.0)
    poller.when(event, lambda _: None)
    poller.stay_awake(object(), 0.001, late_s=10.0)
    await asyncio.sleep(0.02)
    assert event.queries <= 22

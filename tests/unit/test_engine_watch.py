"""When an engine that says nothing is taken for frozen, and when for lost."""

from __future__ import annotations

import asyncio
import time

import pytest

from pdserve.errors import EngineError
from pdserve.worker import engine_watch
from pdserve.worker.engine_watch import EngineWatch

TICK_S = 0.01


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "TICK_S", TICK_S)


class Watched:
    """A watch of five ticks, and how often it called."""

    def __init__(self) -> None:
        self.calls = 0
        self.watch = EngineWatch(5 * TICK_S, self._call)

    async def _call(self) -> None:
        self.calls += 1

    async def watch_for(self, ticks: int) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(self.watch.run(), ticks * TICK_S)


async def test_silence_is_noticed_once_and_ends_with_the_next_word() -> None:
    watched = Watched()
    await watched.watch_for(20)
    assert (watched.calls, watched.watch.is_silent) == (1, True)
    watched.watch.heard()
    assert not watched.watch.is_silent
    await watched.watch_for(20)
    assert (watched.calls, watched.watch.is_silent) == (2, True)


async def test_an_engine_that_speaks_in_time_is_left_alone() -> None:
    watched = Watched()
    watching = asyncio.create_task(watched.watch.run())
    for _ in range(20):
        await asyncio.sleep(2 * TICK_S)
        watched.watch.heard()
    watching.cancel()
    assert (watched.calls, watched.watch.is_silent) == (0, False)


async def test_time_in_which_the_server_itself_was_held_up_counts_against_nobody() -> None:
    watched = Watched()
    watching = asyncio.create_task(watched.watch.run())
    for _ in range(3):
        asyncio.get_running_loop().call_soon(time.sleep, 20 * TICK_S)
        await asyncio.sleep(TICK_S)
    assert (watched.calls, watched.watch.is_silent) == (0, False)
    watching.cancel()


async def test_an_engine_that_does_not_come_back_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_watch, "GIVE_UP_S", 20 * TICK_S)
    watched = Watched()
    with pytest.raises(EngineError, match="silent"):
        await asyncio.wait_for(watched.watch.run(), 5)
    assert watched.calls == 1

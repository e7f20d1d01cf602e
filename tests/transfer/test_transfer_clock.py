"""The clock of a handoff: it stands while there is nothing to transfer."""

from __future__ import annotations

import asyncio
import threading
import time

import uvloop

from kv_transfer.transfer_clock import TransferClock
from pdserve.errors import TransferError

LIMIT_S = 0.1
WAIT_S = 10.0


class Bench:
    """A clock, and when it has struck."""

    def __init__(self) -> None:
        self.struck = asyncio.Event()
        self.errors: list[TransferError] = []
        self.clock = TransferClock(LIMIT_S, self._strike)

    def _strike(self, error: TransferError) -> None:
        self.errors.append(error)
        self.struck.set()


async def test_it_strikes_when_something_has_been_there_for_too_long() -> None:
    bench, began_s = Bench(), time.monotonic()
    bench.clock.more("part")
    await asyncio.wait_for(bench.struck.wait(), WAIT_S)
    assert time.monotonic() - began_s >= LIMIT_S
    assert [error.reason for error in bench.errors] == ["timeout"]


async def test_it_stands_while_nothing_is_there_and_then_begins_anew() -> None:
    bench = Bench()
    await asyncio.sleep(2 * LIMIT_S)
    for part in ("one", "two", "one"):
        bench.clock.more(part)
    bench.clock.none_left("one")
    bench.clock.none_left("two")
    await asyncio.sleep(3 * LIMIT_S)
    assert not bench.errors
    began_s = time.monotonic()
    bench.clock.more("one")
    await asyncio.wait_for(bench.struck.wait(), WAIT_S)
    assert time.monotonic() - began_s >= LIMIT_S


async def test_what_is_left_of_one_part_counts_though_another_has_nothing_left() -> None:
    bench = Bench()
    bench.clock.more("one")
    bench.clock.more("two")
    bench.clock.none_left("one")
    await asyncio.wait_for(bench.struck.wait(), WAIT_S)


def test_a_thread_that_was_held_up_hears_first_what_has_come_meanwhile() -> None:
    """The transceiver's loop, uvloop, runs timers that are due before what others have called it for."""

    async def held_up() -> None:
        bench, loop = Bench(), asyncio.get_running_loop()
        bench.clock.more("part")
        threading.Timer(LIMIT_S / 2, loop.call_soon_threadsafe, (bench.clock.stop,)).start()
        time.sleep(2 * LIMIT_S)  # noqa: ASYNC251 (that is what happens to it)
        await asyncio.sleep(3 * LIMIT_S)
        assert not bench.errors

    uvloop.run(held_up())


async def test_nothing_follows_the_end() -> None:
    bench = Bench()
    bench.clock.more("part")
    bench.clock.stop()
    bench.clock.more("part")
    await asyncio.sleep(3 * LIMIT_S)
    assert not bench.errors

"""`pdserve up` says what it waits for, and stops waiting when told to."""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve import supervisor
from pdserve.config import load
from pdserve.errors import Aborted
from pdserve.supervisor import Supervisor
from tests.cluster import free_ports

TIMEOUT_S = 60.0


def make() -> Supervisor:
    manager, proxy = free_ports(2)
    return Supervisor(load(flags=["--model=any", f"--port={proxy}", f"--manager.port={manager}"]))


async def test_a_conversion_ends_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    converting = asyncio.Event()
    loop = asyncio.get_running_loop()

    def convert(model: str, cancelled: Callable[[], bool]) -> Path:
        loop.call_soon_threadsafe(converting.set)
        deadline = time.monotonic() + TIMEOUT_S
        while not cancelled():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise Aborted("given up")

    monkeypatch.setattr(supervisor, "resolve_model", convert)
    running = asyncio.create_task(make().run())
    await asyncio.wait_for(converting.wait(), TIMEOUT_S)
    signal.raise_signal(signal.SIGTERM)
    assert await asyncio.wait_for(running, TIMEOUT_S) == 0


async def test_who_is_not_ready_is_named_again_and_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(supervisor, "_WAITING_EVERY_S", 0.05)
    cluster = make()
    announcing = asyncio.create_task(cluster._announce(cluster._children()))
    said = ""
    async with asyncio.timeout(TIMEOUT_S):
        while said.count("waiting for manager, proxy, context-0, generation-0; ") < 2:
            await asyncio.sleep(0.05)
            said += capfd.readouterr().out
    announcing.cancel()
    assert re.search(r"^up +\| waiting for manager", said, re.M)

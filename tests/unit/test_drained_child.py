"""`up` and a worker that was drained through the manager."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from pdserve.child import Child
from pdserve.process import EXIT_DRAINED
from tests.manager import until


@pytest.mark.parametrize(("status", "stays_away"), [(EXIT_DRAINED, True), (0, False), (1, False)])
async def test_who_was_drained_stays_away_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, status: int, stays_away: bool
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Child, "say", lambda _, text: said.append(text))
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    child = Child("w", command, dict(os.environ), b"", 2, backoff_s=(0.05,))
    running = asyncio.create_task(child.run())

    def starts() -> int:
        return sum(line.startswith("started") for line in said)

    if stays_away:
        await until(lambda: any("was drained" in line for line in said))
        await asyncio.sleep(0.2)
        assert starts() == 1
    else:
        await until(lambda: starts() >= 3)
    assert not running.done(), "the cluster goes on"
    child.signal(signal.SIGTERM)
    await asyncio.wait_for(running, 20)

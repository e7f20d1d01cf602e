"""A process that is told to end says what it waits for, and is told again to wait no longer."""

from __future__ import annotations

import asyncio
import logging
import signal

import pytest

from pdserve import draining
from pdserve.draining import Stop, drain
from pdserve.protocol import LoadReport, encode, from_worker_decoder
from tests.fakes.proxy_cluster import until
from tests.service.test_worker_server import request, serving

log = logging.getLogger("tests.draining")
LONG_S = 3600.0


async def test_it_says_how_many_are_open_until_they_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(draining, "EVERY_S", 0.01)
    left, idle = [2], asyncio.Event()
    drained = asyncio.create_task(drain(log, Stop(), idle.wait(), lambda: left[0], LONG_S))
    for count, expected in ((1, "2 requests open, 3600 s left; Ctrl-C again ends them"), (0, "1 request open, ")):
        await until(lambda expected=expected: expected in caplog.text, timeout_s=30)
        left[0] = count
    idle.set()
    assert await drained
    assert "Ctrl-C again ends it" in caplog.text


async def test_nothing_is_said_where_nothing_is_open(caplog: pytest.LogCaptureFixture) -> None:
    idle = asyncio.Event()
    idle.set()
    assert await drain(log, Stop(), idle.wait(), lambda: 0, LONG_S)
    assert caplog.messages == []


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
async def test_requests_that_take_too_long_are_left(timeout_s: float) -> None:
    assert not await drain(log, Stop(), asyncio.Event().wait(), lambda: 1, timeout_s)


async def test_the_second_signal_ends_the_wait() -> None:
    stop = Stop()
    with stop.on_signals():
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(stop.asked.wait(), 30)
        assert not stop.at_once.is_set()
        drained = asyncio.create_task(drain(log, stop, asyncio.Event().wait(), lambda: 1, LONG_S))
        signal.raise_signal(signal.SIGINT)
        assert not await asyncio.wait_for(drained, 30)


async def test_a_worker_drains_at_the_first_signal_and_ends_at_the_second() -> None:
    async with serving(f"--disagg_cluster.drain_timeout_sec={LONG_S}") as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("endless", [1], max_tokens=10**9)))
        server.process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            while True:
                message = from_worker_decoder.decode(await socket.receive_bytes())
                if isinstance(message, LoadReport) and message.state == "draining":
                    break
        server.process.send_signal(signal.SIGINT)
        assert await server.ended(60) == 0
        assert server.process.stderr is not None
        assert "draining: 1 request open, 3600 s left; Ctrl-C again ends it" in server.process.stderr.read()

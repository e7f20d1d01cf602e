"""`POST /v1/bench/kv` of a worker's server, in front of a fake engine."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from pdserve.addresses import http_url
from pdserve.http import bind, start
from pdserve.protocol import AbortRequest, GenerateRequest, encode
from pdserve.worker.kv_bench import KvBench
from tests.service.test_worker_server import read, request, serving

PEER = {"worker_id": "generation-0", "instance": "i", "host": "localhost", "port": 1, "layout_hash": "h"}


def body(**changes: Any) -> dict[str, Any]:
    return {"name": "n", "peer": PEER, "num_tokens": 40} | changes


async def test_it_answers_with_what_the_transceiver_measured_and_serves_on() -> None:
    async with serving() as (server, session):
        async with session.post(f"{server.url}/v1/bench/kv", json=body(repeats=3)) as response:
            assert response.status == 200, await response.text()
            assert await response.json() == {
                "handoffs": [{"nbytes": 2560, "seconds": 0.04, "moving_s": 0.03, "busy_s": 0.02}] * 3
            }
        for wrong, status, code in (
            (body(num_tokens=101), 429, "overloaded"),
            (body(num_tokens=0), 400, "invalid_request"),
            (body(repeats=100_000), 400, "invalid_request"),
            (body(other=1), 400, "invalid_request"),
        ):
            async with session.post(f"{server.url}/v1/bench/kv", json=wrong) as response:
                assert response.status == status
                assert (await response.json())["error"]["code"] == code
        async with session.ws_connect(f"{server.url}/v1/stream") as socket:
            await socket.send_bytes(encode(request("a", [1, 2])))
            tokens, _ = await read(socket, 1)
            assert tokens == {"a": [2, 3, 2]}


async def test_the_same_measurement_twice_at_a_time_is_refused_and_a_lost_engine_ends_it() -> None:
    async with serving() as (server, session):
        never = body(num_tokens=2000)
        first = asyncio.create_task(session.post(f"{server.url}/v1/bench/kv", json=never))
        await asyncio.sleep(0.3)
        async with session.post(f"{server.url}/v1/bench/kv", json=never) as response:
            assert response.status == 400
        with pytest.raises(TimeoutError):
            await session.post(f"{server.url}/v1/bench/kv", json=never | {"name": "other"}, timeout=_soon())
        assert not first.done()
        server.process.terminate()
        async with await asyncio.wait_for(first, 10) as response:
            assert response.status == 502
            assert (await response.json())["error"]["code"] == "worker_lost"


@pytest.mark.parametrize("repeats", [1, 4])
async def test_every_handoff_of_a_caller_that_goes_away_is_aborted(repeats: int) -> None:
    forwarded: list[GenerateRequest | AbortRequest] = []
    waiting = asyncio.Event()

    def forward(message: GenerateRequest | AbortRequest) -> None:
        forwarded.append(message)
        waiting.set()

    app = web.Application()
    app.router.add_post("/", KvBench("generation", lambda: None, forward).handle)
    listener = bind("127.0.0.1", 0)
    runner = await start(app, listener)
    url = http_url("127.0.0.1", listener.getsockname()[1])
    try:
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(session.post(url, json=body(repeats=repeats)))
            await asyncio.wait_for(waiting.wait(), 30)
            asking.cancel()
        for _ in range(3000):
            if len(forwarded) == 2 * repeats:
                break
            await asyncio.sleep(0.01)
    finally:
        await runner.cleanup()
    begun, ended = forwarded[:repeats], forwarded[repeats:]
    assert {each.key for each in ended if isinstance(each, AbortRequest)} == {each.key for each in begun}


def _soon() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=0.3)

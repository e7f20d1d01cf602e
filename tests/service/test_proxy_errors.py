"""What clients get when they, the workers or the load are at fault."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

import pdserve.http
import proxy.routes.answer
from pdserve.errors import EngineError, LimitExceeded, TransferError
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until
from tests.unit.test_chat_tools import TOOL

USER = [{"role": "user", "content": "hi"}]
SLOW = {"model": "fake", "prompt": "p", "max_tokens": 500}


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster() as running:
        yield running


def post_raw(cluster: ProxyCluster, body: bytes, content_type: str = "application/json") -> Any:
    return cluster.session.post("/v1/completions", data=body, headers={"Content-Type": content_type})


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_request"),
        (b"", 400, "invalid_request"),
        (b"[1]", 400, "invalid_request"),
        (b'{"model": "\xff"}', 400, "invalid_request"),
        (b'{"model":"fake","prompt":"x","temperature":NaN}', 400, "invalid_request"),
        (b'{"model":"fake","prompt":"x","temperature":1e999}', 400, "invalid_request"),
        (b"[" * 100_000, 400, "invalid_request"),
        (b'{"model":"fake","prompt":"' + b"x" * (10 << 20) + b'"}', 413, "body_too_large"),
    ],
)
async def test_broken_bodies(cluster: ProxyCluster, body: bytes, status: int, code: str) -> None:
    async with post_raw(cluster, body) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == code


async def test_wrong_type_route_and_method(cluster: ProxyCluster) -> None:
    async with post_raw(cluster, b"{}", "text/plain") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (415, "unsupported_media_type")
    async with cluster.session.get("/v1/nowhere") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "not_found")
    async with cluster.session.get("/v1/completions") as response:
        assert (response.status, (await response.json())["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("completions", {"prompt": "x", "max_tokens": -1}, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("completions", {"prompt": "x", "max_tokens": 5000}, "max_tokens"),
        ("completions", {"prompt": "x", "best_of": 2}, "best_of"),
        ("completions", {"prompt": "x", "min_tokens": 17}, "min_tokens"),
        ("completions", {"prompt": "x", "surprise": 1}, "surprise"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"prompt": [5, 300]}, "prompt"),
        ("completions", {"prompt": [5] * 2048}, "prompt"),
        ("completions", {"prompt": "x", "stop_token_ids": [300]}, "stop_token_ids"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": USER, "tools": [{}]}, "tools.0.type"),
        ("chat/completions", {"messages": USER, "tools": [TOOL]}, "tools"),
        ("chat/completions", {"messages": USER, "max_completion_tokens": 5000}, "max_completion_tokens"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x " * 3000}]}, "messages"),
    ],
)
async def test_bad_fields_are_named(cluster: ProxyCluster, route: str, fields: dict[str, Any], param: str) -> None:
    status, body = await cluster.post(route, **fields)
    assert status == 400
    assert body["error"]["param"] == param
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(param)
    assert cluster.contexts[0].received == []


async def test_lengths_are_told_with_their_numbers(cluster: ProxyCluster) -> None:
    _, body = await cluster.post("completions", prompt=[5] * 3000)
    assert body["error"]["code"] == "context_length_exceeded"
    assert "3000" in body["error"]["message"]
    assert "2048" in body["error"]["message"]


async def test_openais_client_knows_the_errors(cluster: ProxyCluster) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model="fake", prompt="x", max_tokens=-1)
        assert bad.value.param == "max_tokens"


async def test_nobody_connected_is_503() -> None:
    async with proxy_cluster(connect=False) as cluster:
        for stream in (False, True):
            async with cluster.session.post("/v1/completions", json={**SLOW, "stream": stream}) as response:
                assert response.status == 503
                assert int(response.headers["Retry-After"]) >= 1
                assert (await response.json())["error"]["code"] == "not_ready"


async def test_one_role_alone_is_503() -> None:
    async with proxy_cluster(connect=False) as cluster:
        cluster.apply("snapshot", workers=[cluster.contexts[0].record()])
        await until(lambda: len(cluster.fleet.members.placeable("context")) == 1)
        status, body = await cluster.post("completions", prompt="x")
        assert (status, body["error"]["code"]) == (503, "not_ready")
        assert "generation" in body["error"]["message"]


async def test_overload_is_429_and_passes() -> None:
    async with proxy_cluster(max_concurrent_requests=2) as cluster:
        cluster.generations[0].behaviour.hang = True
        slow = [asyncio.create_task(cluster.post("completions", prompt="p", max_tokens=50)) for _ in range(2)]
        await until(lambda: len(cluster.generations[0].received) == 2)
        async with cluster.session.post("/v1/completions", json=SLOW) as response:
            assert response.status == 429
            assert int(response.headers["Retry-After"]) >= 1
            assert (await response.json())["error"]["type"] == "overloaded_error"
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        cluster.generations[0].behaviour.hang = False
        await cluster.nothing_open()
        assert (await cluster.post("completions", prompt="p", max_tokens=5))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_is_504_and_frees_both_workers(stream: bool) -> None:
    async with proxy_cluster(request_timeout_s=0.2) as cluster:
        cluster.contexts[0].behaviour.hang = cluster.generations[0].behaviour.hang = True
        status, body = await cluster.post("completions", prompt="p", max_tokens=5, stream=stream)
        assert (status, body["error"]["type"]) == (504, "timeout_error")
        await cluster.nothing_open()
        assert [len(worker.aborted) for worker in cluster.workers] == [1, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("started", [False, True])
async def test_a_client_that_leaves_frees_both_workers(cluster: ProxyCluster, stream: bool, started: bool) -> None:
    cluster.contexts[0].behaviour.omit_handoff = True
    cluster.contexts[0].behaviour.hang = not started
    cluster.generations[0].behaviour.token_delay_s = 0.01
    request = asyncio.create_task(cluster.session.post("/v1/completions", json={**SLOW, "stream": stream}).__aenter__())
    await until(lambda: len(cluster.generations[0].received) == 1 and len(cluster.contexts[0].received) == 1)
    if started:
        await asyncio.sleep(0.1)
    if stream and started:
        response = await request
        await response.content.readuntil(b"\n\n")
        response.close()
    else:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
    await until(lambda: len(cluster.generations[0].aborted) == 1, timeout_s=2.0)
    key = cluster.generations[0].received[0].key
    assert cluster.generations[0].aborted == [key]
    assert cluster.contexts[0].aborted == [key]
    await cluster.nothing_open()
    await until(lambda: not any(link.load.open_requests for link in cluster.fleet.members.links))


async def test_a_clients_mistake_found_by_a_worker_is_passed_on(cluster: ProxyCluster) -> None:
    error = LimitExceeded("max_num_tokens: too long for one step", "max_num_tokens")
    cluster.contexts[0].behaviour.refuse = error.to_info()
    status, body = await cluster.post("completions", prompt="p", max_tokens=5)
    assert (status, body["error"]["code"], body["error"]["param"]) == (400, "limit_exceeded", "max_num_tokens")
    assert len(cluster.contexts[0].received) == 1, "never retried"
    await cluster.nothing_open()
    assert (await cluster.post("completions", prompt="p", max_tokens=5))[0] == 200


@pytest.mark.parametrize("error", [EngineError("a step failed"), TransferError("no answer", "timeout")])
async def test_errors_beyond_the_retries_keep_their_status(error: Any) -> None:
    async with proxy_cluster(max_retries=1) as cluster:
        cluster.generations[0].behaviour.refuse = error.to_info()
        cluster.generations[0].behaviour.times = 10
        status, body = await cluster.post("completions", prompt="p", max_tokens=5)
        assert (status, body["error"]["message"]) == (error.status, error.message)
        assert [request.key.attempt for request in cluster.generations[0].received] == [0, 1]
        await cluster.nothing_open()


async def test_an_error_after_the_first_byte_is_the_last_event() -> None:
    async with proxy_cluster(max_worker_losses=0) as cluster:
        cluster.generations[0].behaviour.die_at = 3
        async with cluster.session.post("/v1/completions", json={**SLOW, "stream": True}) as response:
            assert response.status == 200
            lines = [line for line in (await response.text()).split("\n\n") if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "worker_lost"
        assert len(lines) >= 2
        assert "data: [DONE]" not in lines
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
            cluster.generations[0].behaviour.times = 1
            await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1)
            stream = await client.completions.create(model="fake", prompt="p", max_tokens=50, stream=True)
            with pytest.raises(openai.APIError):
                _ = [chunk async for chunk in stream]


async def test_an_error_in_one_choice_ends_the_others(cluster: ProxyCluster) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.05
    cluster.contexts[0].behaviour.refuse = LimitExceeded("no", "x").to_info()
    status, _ = await cluster.post("completions", prompt=["a", "b", "c"], max_tokens=400)
    assert status == 400
    await cluster.nothing_open()


async def test_a_body_that_never_comes_is_408(cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdserve.http, "BODY_TIMEOUT_S", 0.1)

    async def endless() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)

    headers = {"Content-Type": "application/json"}
    async with cluster.session.post("/v1/completions", data=endless(), headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (408, "request_timeout")


async def test_a_client_that_never_reads_loses_its_connection(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.routes.answer, "_SLOW_CLIENT_S", 0.1)
    async with proxy_cluster(request_timeout_s=3.0) as cluster:
        for worker in cluster.workers:
            worker.max_seq_len = 100_000
            cluster.apply("put", worker_id=worker.worker_id, worker=worker.record())
        cluster.generations[0].behaviour.chunks = [1000]
        fields = {"model": "fake", "prompt": "p", "max_tokens": 90_000, "stream": True, "logprobs": 5}
        body = json.dumps(fields).encode()
        host, port = cluster.url.removeprefix("http://").split(":")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((host, int(port)))
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 1)
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 0)
        assert "did not read" in caplog.text
        await cluster.nothing_open()
        client.close()

"""Streams event by event: their form, what one step becomes, slow clients, and mistakes in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import openai
import pytest

import proxy.routes.answer
import proxy.routes.event_stream
import tests.fakes.proxy_cluster
from pdserve.errors import LimitExceeded
from pdserve.http import start
from pdserve.http_connections import ConnectionLimits
from pdserve.protocol import Finished, OutputFrame, TokenDelta
from proxy.routes.completions import CompletionFormatter
from proxy.routes.event_stream import EventStream
from proxy.routes.events import EventTemplate
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until
from tests.service.test_proxy_api import USER, events, say, tokens_of

BEYOND_ALL_BUFFERS = 1_000_000
"""Tokens whose ids fill the kernel's buffers of a connection, and then asyncio's."""


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster() as running:
        yield running


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
async def test_each_token_is_an_event_of_the_same_form(cluster: ProxyCluster, route: str) -> None:
    text = 'a "b"\\\n\t\x01é🙂</script>'
    say(cluster, text, token_delay_s=0.005)
    prompt = {"prompt": "p"} if route == "completions" else {"messages": USER}
    chunks = await events(cluster, route, max_tokens=99, **prompt, stream_options={"include_usage": True})
    usage = chunks.pop()["usage"]
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    shapes = [{**chunk["choices"][0], "text": 0, "delta": 0} for chunk in chunks]
    assert shapes == [
        *([{**plain, "text": 0, "delta": 0}] * (len(chunks) - 1)),
        {**shapes[-1], "finish_reason": "stop"},
    ]
    assert len({tuple((key, str(chunk[key])) for key in chunk if key != "choices") for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    if route == "completions":
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        assert len(chunks) == usage["completion_tokens"] + 1, "the fake's end comes alone"
    else:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in deltas) == text
        assert all(delta.keys() == {"content"} for delta in deltas[1:])
        assert len(chunks) == 1 + usage["completion_tokens"] + 1


async def test_a_client_of_http_1_0_gets_its_events_bare(cluster: ProxyCluster) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.005
    body = json.dumps({"model": "fake", "prompt": "p", "max_tokens": 6, "stream": True}).encode()
    host, port = cluster.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n")
    writer.write(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    head, _, stream = (await asyncio.wait_for(reader.read(), 10)).partition(b"\r\n\r\n")
    writer.close()
    assert b"chunked" not in head.lower()
    lines = stream.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len(chunks) >= 6
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_token_and_the_end_of_the_same_step_are_one_event() -> None:
    async with proxy_cluster(contexts=0) as cluster:
        worker, (link,) = cluster.generations[0], cluster.fleet.members.links
        worker.behaviour.hang = True
        fields = {"prompt": "p", "max_tokens": 3, "return_token_ids": True}
        answer = asyncio.create_task(events(cluster, "completions", **fields))
        await until(lambda: len(worker.received) == 1)
        key = worker.received[0].key
        for index in range(3):
            ends = [Finished(key, "length")] if index == 2 else []
            link._deliver(OutputFrame([TokenDelta(key, index, [50 + index])], ends))
            await asyncio.sleep(0.02)
        choices = [chunk["choices"][0] for chunk in await answer]
    assert [choice["token_ids"] for choice in choices] == [[50], [51], [52]]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]


async def test_a_failure_in_the_middle_of_a_stream_ends_this_one_alone(
    cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.01
    async with cluster.session.post(
        "/v1/completions", json={"model": "fake", "prompt": "p", "max_tokens": 500, "stream": True}
    ) as response:
        await response.content.readuntil(b"\n\n")
        with monkeypatch.context() as patched:
            patched.setattr(EventTemplate, "fill", lambda *_: 1 / 0)
            with pytest.raises(aiohttp.ClientError):
                await asyncio.wait_for(response.read(), 5)
    assert "ZeroDivisionError" in caplog.text
    await cluster.nothing_open()
    assert (await cluster.post("completions", prompt="p", max_tokens=3))[0] == 200


@contextlib.asynccontextmanager
async def blocked_stream(
    **settings: Any,
) -> AsyncIterator[tuple[ProxyCluster, socket.socket, Callable[[int, list[int], bool], None]]]:
    """A stream whose client has not read yet, blocked by its second event; the function gives it further tokens."""
    async with proxy_cluster(contexts=0, **settings) as cluster:
        worker = cluster.generations[0]
        worker.behaviour.hang = True
        worker.max_seq_len = 2 * BEYOND_ALL_BUFFERS
        cluster.apply("put", worker_id=worker.worker_id, worker=worker.record())
        fields = {"prompt": "p", "max_tokens": BEYOND_ALL_BUFFERS + 500, "return_token_ids": True}
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(cluster.url.rpartition(":")[2])))
        body = json.dumps({"model": "fake", "stream": True, **fields}).encode()
        client.sendall(b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
        await until(lambda: len(worker.received) == 1)
        key, (link,) = worker.received[0].key, cluster.fleet.members.links

        def say_more(start: int, token_ids: list[int], ends: bool) -> None:
            link._deliver(OutputFrame([TokenDelta(key, start, token_ids)], [Finished(key, "length")] if ends else []))

        try:
            say_more(0, [50], False)
            await asyncio.sleep(0.05)
            say_more(1, [51] * BEYOND_ALL_BUFFERS, False)
            await asyncio.sleep(0.05)
            yield cluster, client, say_more
        finally:
            client.close()


async def test_tokens_gather_while_the_client_does_not_read() -> None:
    async with blocked_stream() as (_, client, say_more):
        for index in range(400):
            say_more(1 + BEYOND_ALL_BUFFERS + index, [52], index == 399)
            await asyncio.sleep(0)
        reader, writer = await asyncio.open_connection(sock=client)
        stream = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")[2].decode()
        writer.close()
    *chunks, done, rest = stream.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    token_ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    assert token_ids == [50, *[51] * BEYOND_ALL_BUFFERS, *[52] * 400]
    assert len(choices) < 10, "what gathered is one event"
    assert choices[-1]["finish_reason"] == "length"


async def test_an_error_does_not_wait_for_a_client_that_never_reads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.routes.answer, "_SLOW_CLIENT_S", 0.1)
    async with blocked_stream(request_timeout_s=1.0) as (cluster, _, _):
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 0)
        assert "did not read" in caplog.text


async def test_headers_and_comments_come_while_nothing_else_does(
    cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy.routes.event_stream, "SILENCE_S", 0.1)
    for worker in cluster.workers:
        worker.behaviour.hang = True
    fields = {"model": "fake", "prompt": "p", "max_tokens": 2, "stream": True}
    async with cluster.session.post("/v1/completions", json=fields) as response:
        assert response.status == 200, "sent although no worker has said anything"
        assert response.content_type == "text/event-stream"
        for _ in range(3):
            assert await asyncio.wait_for(response.content.readuntil(b"\n\n"), 20) == b": keep-alive\n\n"
    await cluster.nothing_open()


async def test_openais_client_reads_over_comments(cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.routes.event_stream, "SILENCE_S", 0.02)
    monkeypatch.setattr(proxy.routes.answer, "_STATUS_WAIT_S", 0.0)
    say(cluster, "one two", first_token_delay_s=0.5, token_delay_s=0.05)
    sent: list[bytes] = []
    send_now = EventStream.send_now
    monkeypatch.setattr(EventStream, "send_now", lambda self, events: sent.append(events) or send_now(self, events))
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"
    assert sent.count(b": keep-alive\n\n") >= 1


async def test_a_stream_with_tokens_has_no_comments(cluster: ProxyCluster) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.005
    fields = {"model": "fake", "prompt": "p", "max_tokens": 20, "stream": True}
    async with cluster.session.post("/v1/completions", json=fields) as response:
        lines = (await response.text()).split("\n\n")
    assert all(line.startswith("data: ") for line in lines if line)


async def test_an_error_after_the_headers_is_an_event(cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.routes.answer, "_STATUS_WAIT_S", 0.0)
    cluster.contexts[0].behaviour.hang = True
    fields = {"model": "fake", "prompt": "p", "max_tokens": 5, "stream": True}
    async with cluster.session.post("/v1/completions", json=fields) as response:
        assert response.status == 200
        (worker,) = cluster.contexts
        await until(lambda: len(worker.received) == 1)
        error = LimitExceeded("no", "x").to_info()
        (link,) = (link for link in cluster.fleet.members.links if link.worker_id == worker.worker_id)
        link._deliver(OutputFrame([], [Finished(worker.received[0].key, "error", error=error)]))
        body = await asyncio.wait_for(response.text(), 20)
    assert json.loads(body.removeprefix("data: "))["error"]["code"] == "limit_exceeded"
    await until(lambda: not cluster.generations[0].open_keys, 20)


async def test_a_stream_that_is_not_read_is_cut_and_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tests.fakes.proxy_cluster, "start", functools.partial(start, limits=ConnectionLimits(stall_timeout_s=0.5))
    )
    async with blocked_stream() as (cluster, _, _):
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 0, 20)
        await cluster.nothing_open()
        assert cluster.generations[0].aborted


@pytest.mark.parametrize("stream", [False, True])
async def test_many_log_probabilities_are_written_off_the_loop(
    cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(proxy.routes.answer, "_SCORED_AT_ONCE", 20)
    written: list[tuple[bool, int]] = []
    logprobs = CompletionFormatter._logprobs

    def noted(self: CompletionFormatter, scored: Any) -> Any:
        written.append((threading.current_thread() is threading.main_thread(), len(scored)))
        return logprobs(self, scored)

    monkeypatch.setattr(CompletionFormatter, "_logprobs", noted)
    cluster.generations[0].behaviour.chunks = [200, 3]
    cluster.generations[0].behaviour.token_delay_s = 0.01
    fields: dict[str, Any] = {"prompt": "the quick", "max_tokens": 300, "logprobs": 2, "echo": True}
    if stream:
        chunks = await events(cluster, "completions", **fields)
        tokens = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    else:
        tokens = (await cluster.post("completions", **fields))[1]["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) == len(tokens_of(cluster, "the quick")) + 300
    assert sum(number for _, number in written) == len(tokens)
    assert max(number for _, number in written) >= 200
    assert all(number <= 20 for in_loop, number in written if in_loop)

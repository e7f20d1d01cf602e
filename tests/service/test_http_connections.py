"""Connections that are silent, do not read, are too many, or carry no HTTP: the same for every HTTP server we have."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import random
import resource
import socket
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiohttp import web
from pydantic import BaseModel

import cluster_manager.server
import pdserve.http
import pdserve.log_rate
import pdserve.worker.server
import proxy.server
from pdserve.http import bind, errors_as_json, json_response, read_body, start
from pdserve.http_connections import ConnectionLimits, affordable_connections
from tests.fakes.proxy_cluster import proxy_cluster, until

LARGE_BYTES = 20_000_000
PATIENT = ConnectionLimits()


class Body(BaseModel):
    text: str


@pytest.fixture(autouse=True)
def every_line_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdserve.log_rate, "INTERVAL_S", 0.0)


class Site:
    """One server. `sizes` is what its large answer counts."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    async def open(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def site(limits: ConnectionLimits) -> AsyncIterator[Site]:
    async def take(request: web.Request) -> web.Response:
        return json_response({"length": len((await read_body(request, Body)).text)})

    async def small(_: web.Request) -> web.Response:
        return json_response({})

    async def large(_: web.Request) -> web.Response:
        return web.Response(body=bytes(LARGE_BYTES))

    app = web.Application(middlewares=[errors_as_json])
    app.router.add_post("/take", take)
    app.router.add_get("/small", small)
    app.router.add_get("/large", large)
    listener = bind("127.0.0.1", 0)
    runner = await start(app, listener, limits)
    try:
        yield Site(listener.getsockname()[1])
    finally:
        await runner.cleanup()


def test_all_servers_start_the_same_way() -> None:
    for module in (proxy.server, cluster_manager.server, pdserve.worker.server):
        assert module.start is start


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /small HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_a_request_that_does_not_come_ends_the_connection(sent: bytes) -> None:
    async with site(ConnectionLimits(head_timeout_s=0.2)) as server:
        reader, writer = await server.open(sent)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_a_head_that_trickles_is_no_excuse() -> None:
    async with site(ConnectionLimits(head_timeout_s=0.3)) as server:
        reader, writer = await server.open(b"GET /small HTTP/1.1\r\n")
        ended = asyncio.create_task(reader.read())
        async with asyncio.timeout(20):
            while not ended.done():
                writer.write(b"X-More: x\r\n")
                await asyncio.sleep(0.02)
        await asyncio.gather(ended, return_exceptions=True)
        writer.close()


async def test_the_second_head_has_its_time_as_well() -> None:
    async with site(ConnectionLimits(head_timeout_s=1.0, idle_timeout_s=600)) as server:
        reader, writer = await server.open(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(1.5)
        writer.write(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"{}")).startswith(b"HTTP/1.1 200"), "idle between two requests is allowed"
        writer.write(b"GET /small")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()


async def test_an_idle_connection_ends() -> None:
    async with site(ConnectionLimits(idle_timeout_s=1.0)) as server:
        reader, writer = await server.open(b"GET /small HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).endswith(b"{}")
        writer.close()


async def test_a_reader_that_does_not_read_is_cut_and_a_slow_one_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with site(ConnectionLimits(stall_timeout_s=2.0)) as server:
        stalled, slow = socket.socket(), socket.socket()
        for client in (stalled, slow):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n")
            client.setblocking(False)
        loop, received = asyncio.get_running_loop(), 0
        while received < LARGE_BYTES:
            received += len(await asyncio.wait_for(loop.sock_recv(slow, 1 << 20), 60))
            await asyncio.sleep(0.002)
        await until(lambda: "does not read" in caplog.text, 60)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := await asyncio.wait_for(loop.sock_recv(stalled, 1 << 20), 20):
                received += len(part)
        assert received < LARGE_BYTES
        stalled.close()
        slow.close()


async def test_a_frozen_server_blames_nobody() -> None:
    async with site(ConnectionLimits(head_timeout_s=1.0)) as server:
        reader, writer = await server.open(b"GET /small")
        await asyncio.sleep(0.1)
        time.sleep(1.5)  # noqa: ASYNC251 - the freeze
        await asyncio.sleep(0.3)
        writer.write(b" HTTP/1.0\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 20)).startswith(b"HTTP/1.0 200")
        writer.close()


async def test_too_many_connections_are_refused_at_once_and_places_come_back() -> None:
    async with site(ConnectionLimits(max_connections=3)) as server:
        held = [await server.open() for _ in range(3)]
        reader, writer = await server.open()
        answer = await asyncio.wait_for(reader.read(), 20)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"Retry-After" in answer
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "not_ready"
        writer.close()
        held[0][1].close()

        async with asyncio.timeout(20):
            answer = b""
            while not answer.startswith(b"HTTP/1.0 200"):
                answer = await send_blob(server, b"GET /small HTTP/1.0\r\n\r\n")
        for _, other in held[1:]:
            other.close()


@pytest.mark.parametrize(
    ("soft", "hard", "connections"),
    [(1024, 1024, 768), (1024, 4096, 3584), (256, 1 << 20, 65536), (64, resource.RLIM_INFINITY, 65536), (20, 20, 16)],
)
def test_clients_never_get_all_descriptors(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, connections: int
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert affordable_connections() == connections
    assert asked == ([] if soft == hard else [(hard, hard)])


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
async def test_a_body_that_is_not_what_its_encoding_says_is_a_mistake(
    encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with site(PATIENT) as server, aiohttp.ClientSession() as session:
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        body = b'{"text": "plain"}'
        async with session.post(f"{server.url}/take", data=body, headers=headers) as response:
            assert response.status == 400
        packed = gzip.compress(json.dumps({"text": "x" * 1000}).encode())
        async with session.post(f"{server.url}/take", data=packed, headers={"Content-Encoding": "gzip"}) as response:
            assert await response.json() == {"length": 1000}
    assert "Traceback" not in caplog.text


def blobs() -> list[bytes]:
    """What is no HTTP, or almost."""
    shuffler = random.Random(20)
    good = (
        b'POST /take HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"text": "a"}'
    )
    heads = [b"GET ", b"POST /take HTTP/1.1\r\n", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n"]
    tails = [b"Content-Length: x\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"Content-Encoding: gzip\r\n"]
    found = []
    for index in range(240):
        noise = shuffler.randbytes(shuffler.randint(1, 300))
        if index % 3 == 0:
            place = shuffler.randrange(len(good))
            found.append(good[:place] + noise[:3] + good[place + shuffler.randint(0, 5) :])
        elif index % 3 == 1:
            found.append(shuffler.choice(heads) + noise)
        else:
            found.append(b"POST /take HTTP/1.1\r\nHost: x\r\n" + shuffler.choice(tails) + noise + b"\r\n\r\n")
    return found


async def send_blob(server: Site, blob: bytes, timeout_s: float = 20.0) -> bytes:
    """What comes back for `blob` before the connection ends, or until the time is up."""
    reader, writer = await server.open(blob)
    with contextlib.suppress(ConnectionError, TimeoutError):
        return await asyncio.wait_for(reader.read(), timeout_s)
    writer.close()
    return b""


async def test_noise_is_answered_400_and_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(pdserve.log_rate, "INTERVAL_S", 3600.0)
    monkeypatch.setattr(pdserve.http, "BODY_TIMEOUT_S", 0.5)
    async with site(ConnectionLimits(head_timeout_s=30.0)) as server:
        answers = await asyncio.gather(*(send_blob(server, blob, 4.0) for blob in blobs()))
        assert await send_blob(server, b"GET /small HTTP/1.0\r\n\r\n")
    statuses = {answer.split(b" ", 2)[1] for answer in answers if answer}
    assert b"400" in statuses
    assert b"500" not in statuses
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    assert sum("malformed HTTP" in record.message for record in caplog.records) <= 1
    malformed = [answer for answer in answers if b"malformed HTTP" in answer]
    assert malformed
    for answer in malformed:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


async def test_the_proxy_bears_noise_as_well(caplog: pytest.LogCaptureFixture) -> None:
    async with proxy_cluster() as cluster:
        server = Site(int(cluster.url.rpartition(":")[2]))
        requests = [blob.replace(b"/take", b"/v1/completions") for blob in blobs()]
        answers = await asyncio.gather(*(send_blob(server, request, 1.0) for request in requests))
        assert not any(b" 500 " in answer.partition(b"\r\n")[0] for answer in answers)
        assert (await cluster.post("completions", prompt="p", max_tokens=2))[0] == 200
        await until(lambda: cluster.service.metrics.in_flight._value.get() == 0)
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []

"""A worker's server process in front of a fake engine: sockets, endings, draining, death."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest

from pdserve import addresses
from pdserve.cluster_client import ClusterClient
from pdserve.config import load
from pdserve.errors import ListenError
from pdserve.process import EXIT_DRAINED
from pdserve.protocol import (
    PROTOCOL_VERSION,
    AbortRequest,
    EngineLimits,
    EngineReady,
    Finished,
    GenerateRequest,
    Hello,
    Key,
    LoadReport,
    OutputFrame,
    Sampling,
    encode,
    from_worker_decoder,
)
from pdserve.worker.server import WorkerServer
from tests.cluster import free_ports
from tests.fakes.fake_engine import HINDERED
from tests.frames import MALFORMED
from tests.manager import TestManager, until

_SERVER = """
import sys
from pdserve.config import load
from pdserve.process import configure_logging, die_with_parent
from pdserve.worker.launch import run_worker
die_with_parent()
configure_logging("info")
sys.exit(run_worker(load([], sys.argv[1:]), "context", 0, "tests.fakes.fake_engine"))
"""


class Server:
    def __init__(self, model: str = "any", *flags: str) -> None:
        port, manager_port = free_ports(2)
        self.url = f"http://localhost:{port}"
        keys = [f"--model={model}", f"--context_servers.port={port}", f"--manager.port={manager_port}"]
        keys += ["--disagg_cluster.drain_timeout_sec=3", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, *keys], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )

    async def wait_ready(self, session: aiohttp.ClientSession) -> None:
        for _ in range(200):
            try:
                async with session.get(f"{self.url}/health") as response:
                    if response.status == 200:
                        return
                    assert response.status == 503
                    assert response.headers["Retry-After"]
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.05)
        raise AssertionError("not ready")

    async def log(self) -> str:
        """Ends the server; what it has logged."""
        self.process.terminate()
        return (await asyncio.to_thread(self.process.communicate, timeout=60))[1]

    async def ended(self, timeout_s: float = 60) -> int:
        return await asyncio.to_thread(self.process.wait, timeout_s)


@asynccontextmanager
async def serving(*flags: str) -> AsyncIterator[tuple[Server, aiohttp.ClientSession]]:
    server = Server("any", *flags)
    family: list[psutil.Process] = []
    try:
        async with aiohttp.ClientSession() as session:
            await server.wait_ready(session)
            family = psutil.Process(server.process.pid).children(recursive=True)
            yield server, session
    finally:
        server.process.terminate()
        server.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive


def request(name: str, tokens: list[int], max_tokens: int = 3) -> GenerateRequest:
    return GenerateRequest(
        key=Key(name, 0),
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        sampling=Sampling(seed=1, max_tokens=max_tokens),
        timeout_s=30,
        phase="context",
    )


async def read(socket: aiohttp.ClientWebSocketResponse, ends: int) -> tuple[dict[str, list[int]], list[Finished]]:
    """Tokens by request and endings, until `ends` requests have ended."""
    tokens: dict[str, list[int]] = {}
    finished: list[Finished] = []
    while len(finished) < ends:
        message = from_worker_decoder.decode(await asyncio.wait_for(socket.receive_bytes(), 30))
        if isinstance(message, OutputFrame):
            for delta in message.deltas:
                tokens.setdefault(delta.key.request_id, []).extend(delta.token_ids)
            finished += message.finished
    return tokens, finished


async def test_each_socket_gets_its_own_requests() -> None:
    async with serving() as (server, session):
        sockets = [await session.ws_connect(f"{server.url}/v1/stream") for _ in range(2)]
        for number, socket in enumerate(sockets):
            hello = from_worker_decoder.decode(await socket.receive_bytes())
            assert isinstance(hello, Hello)
            assert (hello.version, hello.sender) == (PROTOCOL_VERSION, "context-0")
            assert isinstance(from_worker_decoder.decode(await socket.receive_bytes()), LoadReport)
            await socket.send_bytes(encode(Hello(version=PROTOCOL_VERSION, sender=f"proxy-{number}")))
            await socket.send_bytes(encode(request(f"r{number}", [10 * number, 10 * number + 1])))
        assert await read(sockets[0], 1) == ({"r0": [1, 2, 1]}, [Finished(Key("r0", 0), "length")])
        assert await read(sockets[1], 1) == ({"r1": [11, 12, 11]}, [Finished(Key("r1", 0), "length")])
        async with session.get(f"{server.url}/metrics") as response:
            text = await response.text()
        assert re.search(r"^pdserve_worker_sockets 2.0$", text, re.M)
        assert re.search(r'^pdserve_kv_blocks\{state="free"\} 8.0$', text, re.M)


async def test_a_closed_socket_aborts_its_requests_and_no_others() -> None:
    async with serving() as (server, session):
        gone = await session.ws_connect(f"{server.url}/v1/stream")
        stays = await session.ws_connect(f"{server.url}/v1/stream")
        await gone.send_bytes(encode(request("gone", [1], max_tokens=10**6)))
        await stays.send_bytes(encode(request("stays", [1], max_tokens=50)))
        await gone.close()
        _, ends = await read(stays, 1)
        assert ends == [Finished(Key("stays", 0), "length")]
        for _ in range(100):
            async with session.get(f"{server.url}/metrics") as response:
                if re.search(r"^pdserve_engine_running 0.0$", await response.text(), re.M):
                    return
            await asyncio.sleep(0.02)
        raise AssertionError("the engine still runs a request that nobody waits for")


async def test_an_abort_reaches_the_engine() -> None:
    async with serving() as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("long", [1], max_tokens=10**6)))
        await socket.send_bytes(encode(AbortRequest(Key("long", 0))))
        _, ends = await read(socket, 1)
        assert ends == [Finished(Key("long", 0), "abort")]


async def test_a_bad_frame_closes_the_socket_only() -> None:
    bad_frames: list[tuple[bytes | str, int]] = [(frame, 1007) for frame in MALFORMED]
    bad_frames += [(encode(Hello(version=99, sender="x")), 1002), ("text", 1003)]
    async with serving() as (server, session):
        good = await session.ws_connect(f"{server.url}/v1/stream")
        for frame, code in bad_frames:
            bad = await session.ws_connect(f"{server.url}/v1/stream")
            await (bad.send_str(frame) if isinstance(frame, str) else bad.send_bytes(frame))
            while (message := await bad.receive(timeout=30)).type != aiohttp.WSMsgType.CLOSE:
                assert message.type == aiohttp.WSMsgType.BINARY
            assert bad.close_code == code, frame[:20]
        await good.send_bytes(encode(request("r", [1])))
        assert (await read(good, 1))[1][0].reason == "length"
        log = await server.log()
        assert "Traceback" not in log
        assert log.count("hanging up on proxy") == len(MALFORMED)


async def test_a_worker_whose_engine_can_reach_no_peer_takes_no_requests_until_it_can() -> None:
    async with serving() as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("one way", [HINDERED])))
        await reported(socket, "starting")
        async with session.get(f"{server.url}/health") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "2")
            assert "Too many open files" in (await response.json())["error"]["message"]
        await socket.send_bytes(encode(request("refused", [1])))
        while (finished := (await read(socket, 1))[1][0]).key.request_id != "refused":
            pass
        assert finished.error is not None
        assert (finished.error.code, finished.error.retryable) == ("not_ready", True)
        await socket.send_bytes(encode(AbortRequest(Key("one way", 0))))
        await reported(socket, "ready")
        async with session.get(f"{server.url}/health") as response:
            assert response.status == 200


async def reported(socket: aiohttp.ClientWebSocketResponse, state: str) -> None:
    """Until the worker reports `state`."""
    while True:
        message = from_worker_decoder.decode(await asyncio.wait_for(socket.receive_bytes(), 30))
        if isinstance(message, LoadReport) and message.state == state:
            return


@pytest.mark.parametrize(
    ("hostname", "listens", "reached", "url"),
    [
        ("localhost", "localhost", "localhost", "http://localhost:"),
        ("::1", "::1", "::1", "http://[::1]:"),
        ("[::1]", "[::1]", "::1", "http://[::1]:"),
        ("0.0.0.0", "0.0.0.0", "10.1.2.3", "http://10.1.2.3:"),
    ],
)
async def test_a_worker_tells_where_it_is_reached_not_where_it_listens(
    hostname: str, listens: str, reached: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_own_address", lambda towards, port: "10.1.2.3")
    config = load([], ["--model=any", f"--context_servers.hostname={hostname}", "--context_servers.port=0"])
    try:
        server = WorkerServer(config, config.context_servers, "context", 0, "no.engine")
    except (OSError, ListenError):
        pytest.skip(f"this host has no {hostname}")
    try:
        spec = server._link._spec
        assert (spec.kv_host, spec.kv_dial_host) == (listens, reached)
        server._ready = EngineReady(
            limits=EngineLimits(**dict.fromkeys(EngineLimits.__struct_fields__[:6], 1)), dtype="", device=""
        )
        assert server._make_info("1").url.startswith(url)
    finally:
        server._listener.close()
        await server._link.stop()


async def test_a_message_of_an_unknown_kind_is_left_alone() -> None:
    async with serving() as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(msgspec.msgpack.encode({"type": "pause", "for_s": 3}))
        await socket.send_bytes(encode(request("r", [1])))
        assert (await read(socket, 1))[1] == [Finished(Key("r", 0), "length")]


async def test_a_dead_engine_finishes_its_requests_and_ends_the_worker() -> None:
    async with serving() as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("victim", [1], max_tokens=10**6)))
        await socket.send_bytes(encode(request("killer", [666])))
        _, ends = await read(socket, 2)
        assert {end.key.request_id for end in ends} == {"victim", "killer"}
        assert all(end.error is not None and end.error.retryable for end in ends)
        assert await server.ended() == 1


async def test_a_worker_hangs_up_while_its_engine_is_frozen_and_serves_again_afterwards() -> None:
    limits = ("--disagg_cluster.heartbeat_interval_sec=0.5", "--disagg_cluster.inactive_timeout_sec=1.5")
    async with serving(*limits) as (server, session):
        [engine] = psutil.Process(server.process.pid).children()
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("r", [1], max_tokens=10**6)))
        assert isinstance(from_worker_decoder.decode(await socket.receive_bytes()), Hello)
        engine.suspend()
        while (message := await socket.receive(timeout=30)).type is aiohttp.WSMsgType.BINARY:
            assert not isinstance(from_worker_decoder.decode(message.data), Finished)
        assert message.type is aiohttp.WSMsgType.CLOSE
        async with session.get(f"{server.url}/health") as response:
            assert response.status == 503
            assert "engine" in (await response.json())["error"]["message"]
        with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
            await session.ws_connect(f"{server.url}/v1/stream")
        engine.resume()
        await server.wait_ready(session)
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("again", [1])))
        assert (await read(socket, 1))[1] == [Finished(Key("again", 0), "length")]
        async with session.get(f"{server.url}/metrics") as response:
            assert re.search(r"^pdserve_engine_running 0.0$", await response.text(), re.M), "the first one was aborted"


async def test_sigterm_drains() -> None:
    async with serving() as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("old", [1], max_tokens=60)))
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(100):
            message = from_worker_decoder.decode(await socket.receive_bytes())
            if isinstance(message, LoadReport) and message.state == "draining":
                break
        await socket.send_bytes(encode(request("new", [1])))
        _, ends = await read(socket, 2)
        by_name = {end.key.request_id: end for end in ends}
        assert by_name["old"].reason == "length"
        assert by_name["new"].error is not None
        assert by_name["new"].error.code == "draining"
        assert await server.ended() == 0


async def test_what_outlives_a_drain_goes_elsewhere_with_the_tokens_that_it_has() -> None:
    async with serving("--disagg_cluster.drain_timeout_sec=0.3") as (server, session):
        socket = await session.ws_connect(f"{server.url}/v1/stream")
        await socket.send_bytes(encode(request("long", [1], max_tokens=10**6)))
        await asyncio.sleep(0.1)
        server.process.send_signal(signal.SIGTERM)
        tokens, [end] = await read(socket, 1)
        assert tokens["long"]
        assert end.error is not None
        assert (end.error.code, end.error.retryable) == ("draining", True)
        assert await server.ended() == 0


async def test_a_worker_that_was_drained_through_the_manager_says_so_with_its_status() -> None:
    async with TestManager() as manager, ClusterClient(manager.url) as client:
        keys = (
            "--manager.hostname=127.0.0.1",
            f"--manager.port={manager.port}",
            "--disagg_cluster.drain_timeout_sec=20",
        )
        async with serving(*keys) as (server, session):
            socket = await session.ws_connect(f"{server.url}/v1/stream")
            await socket.send_bytes(encode(request("old", [1], max_tokens=100)))
            await until(lambda: _is_listed(client))
            await client.drain("context-0")
            _, [end] = await read(socket, 1)
            assert end.reason == "length", "what is open is finished first"
            assert await server.ended() == EXIT_DRAINED


async def _is_listed(client: ClusterClient) -> bool:
    return bool((await client.workers()).workers)


async def test_an_engine_that_names_a_bad_key_ends_the_worker_with_status_2() -> None:
    server = Server("broken")
    _, stderr = await asyncio.to_thread(server.process.communicate, None, 20)
    assert server.process.returncode == 2
    assert "dtype: not on this planet" in stderr


async def test_a_worker_that_is_still_starting_says_so_and_stops_when_told() -> None:
    server = Server("slow")
    async with aiohttp.ClientSession() as session:
        for _ in range(200):
            try:
                async with session.get(f"{server.url}/health") as response:
                    assert response.status == 503
                    assert (await response.json())["error"]["type"] == "not_ready_error"
                break
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(0.05)
    server.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(server.process.communicate, None, 30)
    assert server.process.returncode == 0

"""Membership, health and shutdown of the proxy."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

import proxy.fleet.link
import proxy.server
from pdserve.cluster_api import WatchEvent
from pdserve.config import ClusterConfig
from pdserve.errors import ListenError
from pdserve.http import bind
from proxy.server import run
from tests.fakes.fake_worker import FakeWorker
from tests.fakes.proxy_cluster import ProxyCluster, byte_level_tokenizer, proxy_cluster, until
from tests.frames import MALFORMED


async def works(cluster: ProxyCluster) -> bool:
    status, _ = await cluster.post("completions", prompt="p", max_tokens=3)
    return status == 200


async def test_health_says_what_is_missing() -> None:
    async with proxy_cluster(connect=False) as cluster:
        async with cluster.session.get("/health") as response:
            body = await response.json()
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert "0 of 1 context" in body["error"]["message"]
            assert body["workers"]["generation"] == {"ready": 0, "required": 1}
        for path in ("/health/live", "/health?live"):
            async with cluster.session.get(path) as response:
                assert response.status == 200
        await cluster.connect()
        async with cluster.session.get("/health") as response:
            assert response.status == 200


async def test_an_empty_snapshot_takes_nobody_out_whose_socket_lives() -> None:
    async with proxy_cluster() as cluster:
        cluster.apply("snapshot", workers=[])
        cluster.apply("delete", worker_id="generation-0")
        await asyncio.sleep(0.05)
        assert await works(cluster)
        await cluster.generations[0].drop_sockets()
        await until(lambda: len(cluster.fleet.members.links) == 1)
        assert not await works(cluster)
        cluster.apply("put", worker_id="generation-0", worker=cluster.generations[0].record())
        await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1)
        assert await works(cluster)


async def test_a_socket_that_breaks_is_made_again_while_the_record_stands() -> None:
    async with proxy_cluster() as cluster:
        await cluster.generations[0].drop_sockets()
        await until(lambda: cluster.generations[0].connections == 2)
        await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1)
        assert await works(cluster)


async def test_a_frame_that_is_no_message_costs_its_worker_the_socket_and_nobody_else_anything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(proxy.fleet.link, "_BACKOFF_S", (0.01,))
    async with proxy_cluster(generations=2) as cluster:
        mad, _ = cluster.generations
        for number, frame in enumerate(MALFORMED, start=2):
            await mad.say(frame)
            await until(lambda number=number: mad.connections == number)  # type: ignore[misc]
            await until(lambda: len(cluster.fleet.members.placeable("generation")) == 2)
        assert await works(cluster)
        assert all(link.connected for link in cluster.fleet.members.links)
    assert [record for record in caplog.records if record.exc_info] == []
    assert len([record for record in caplog.records if "are not a message" in record.message]) == len(MALFORMED)


async def test_a_message_of_an_unknown_kind_is_left_alone() -> None:
    async with proxy_cluster() as cluster:
        (worker,) = cluster.generations
        await worker.say(msgspec.msgpack.encode({"type": "pause", "for_s": 3}))
        assert await works(cluster)
        assert worker.connections == 1


async def test_nothing_is_sent_to_an_address_that_is_none(caplog: pytest.LogCaptureFixture) -> None:
    async with proxy_cluster() as cluster:
        record = cluster.generations[0].record()
        for number, url in enumerate(("http://0.0.0.0:1", "http://h:1/x?y=\nERROR", "file:///etc/passwd")):
            info = record.info.model_copy(update={"worker_id": f"odd-{number}", "url": url})
            cluster.apply("put", worker_id=info.worker_id, worker=record.model_copy(update={"info": info}))
        assert len(cluster.fleet.members.links) == 2
        told = [each.getMessage() for each in caplog.records if "gets no requests" in each.getMessage()]
        assert len(told) == 3
        assert all(line.isprintable() for line in told)


async def test_draining_workers_get_no_new_requests_by_record_or_by_report() -> None:
    async with proxy_cluster(generations=2) as cluster:
        first, second = cluster.generations
        cluster.apply("put", worker_id=first.worker_id, worker=first.record("draining"))
        for _ in range(4):
            assert await works(cluster)
        assert first.received == []
        cluster.apply("put", worker_id=first.worker_id, worker=first.record())
        await second.report("draining")
        await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1)
        assert await works(cluster)
        assert len(first.received) == 1
        await second.report("ready")
        await until(lambda: len(cluster.fleet.members.placeable("generation")) == 2)


async def test_a_worker_that_registers_again_keeps_its_socket() -> None:
    async with proxy_cluster() as cluster:
        (link,) = cluster.fleet.members.placeable("generation")
        record = cluster.generations[0].record()
        renewed = record.model_copy(update={"info": record.info.model_copy(update={"incarnation": "9"})})
        cluster.apply("put", worker_id="generation-0", worker=renewed)
        assert cluster.fleet.members.placeable("generation") == [link]
        assert link.info.incarnation == "9"


async def test_another_process_under_the_same_name_replaces_the_old_one_which_may_finish() -> None:
    async with proxy_cluster() as cluster:
        old = cluster.generations[0]
        old.behaviour.token_delay_s = 0.02
        request = asyncio.create_task(cluster.post("completions", prompt="p", max_tokens=12))
        await until(lambda: len(old.received) == 1)
        new = FakeWorker("generation-0", "generation", cluster.handoffs, old.behaviour, incarnation="2")
        await new.start()
        cluster.generations.append(new)
        cluster.apply("put", worker_id="generation-0", worker=new.record())
        await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1)
        assert await works(cluster)
        assert len(new.received) == 1
        assert (await request)[0] == 200
        assert len(old.received) == 1


async def test_load_reports_of_other_proxies_requests_count() -> None:
    async with proxy_cluster(generations=2) as cluster:
        first, second = cluster.generations
        await first.report(running=5)
        await until(lambda: any(link.load.open_requests == 5 for link in cluster.fleet.members.links))
        for _ in range(3):
            assert await works(cluster)
        assert (len(first.received), len(second.received)) == (0, 3)


async def test_round_robin_and_least_loaded_spread() -> None:
    for placement in ("round_robin", "least_loaded"):
        async with proxy_cluster(contexts=2, generations=2, placement=placement) as cluster:
            await asyncio.gather(*(cluster.post("completions", prompt="p", max_tokens=4) for _ in range(8)))
            assert [len(worker.received) for worker in cluster.workers] == [4, 4, 4, 4]


async def test_a_frozen_worker_is_noticed_by_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.fleet.link, "_HEARTBEAT_S", 0.3)
    async with proxy_cluster(generations=1) as cluster:
        frozen = await _frozen_worker(cluster)
        try:
            await until(lambda: len(cluster.fleet.members.placeable("generation")) == 2)
            await until(lambda: len(cluster.fleet.members.placeable("generation")) == 1, timeout_s=3.0)
            assert await cluster.post("completions", prompt="p", max_tokens=2), "the other worker still answers"
        finally:
            frozen.close()
            await frozen.wait_closed()


async def _frozen_worker(cluster: ProxyCluster) -> asyncio.Server:
    """A worker that greets and then never reads or answers again."""
    import base64
    import hashlib

    from pdserve.protocol import PROTOCOL_VERSION, Hello, encode

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        key = next(line.split(": ")[1] for line in head.split("\r\n") if line.lower().startswith("sec-websocket-key"))
        accept = base64.b64encode(hashlib.sha1(key.encode() + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        hello = encode(Hello(version=PROTOCOL_VERSION, sender="generation-9"))
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + bytes([0x82, len(hello)]) + hello
        )
        await asyncio.Event().wait()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    record = cluster.generations[0].record()
    port = server.sockets[0].getsockname()[1]
    info = record.info.model_copy(update={"worker_id": "generation-9", "url": f"http://127.0.0.1:{port}"})
    cluster.apply("put", worker_id="generation-9", worker=record.model_copy(update={"info": info}))
    return server


class FakeManager:
    """Stands in for `ClusterClient`: a fixed snapshot, then silence."""

    workers: list[FakeWorker] = []

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    async def __aenter__(self) -> FakeManager:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def watch(self) -> AsyncIterator[WatchEvent]:
        yield WatchEvent(type="snapshot", revision=1, workers=[worker.record() for worker in self.workers])
        await asyncio.Event().wait()


@pytest.fixture
async def running(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[dict[str, Any]]:
    """`proxy.server.run` over a model folder and two fake workers, as the command starts it; it drains for a second,
    or for the fixture's parameter."""
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"vocab_size": 300, "eos_token_id": 2}')
    workers = [FakeWorker("context-0", "context"), FakeWorker("generation-0", "generation")]
    workers[1].handoffs = workers[0].handoffs
    for worker in workers:
        await worker.start()
    monkeypatch.setattr(FakeManager, "workers", workers)
    monkeypatch.setattr(proxy.server, "ClusterClient", FakeManager)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = ClusterConfig.model_validate(
        {
            "model": str(tmp_path),
            "hostname": "127.0.0.1",
            "port": port,
            "proxy": {"served_model_name": "fake"},
            "disagg_cluster": {"drain_timeout_sec": getattr(request, "param", 1.0)},
            "context_servers": {},
            "generation_servers": {},
        }
    )
    task = asyncio.create_task(run(config))
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield {"task": task, "session": session, "workers": workers, "config": config}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for worker in workers:
        await worker.stop()


async def ready(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(5):
        while True:
            try:
                async with session.get("/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectionError:
                pass
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("finishes", [True, False])
async def test_sigterm_finishes_open_requests_and_ends(running: dict[str, Any], finishes: bool) -> None:
    session, workers = running["session"], running["workers"]
    await ready(session)
    workers[1].behaviour.token_delay_s = 0.02
    workers[1].behaviour.hang = not finishes
    fields = {"model": "fake", "prompt": "hello", "max_tokens": 20}
    request = asyncio.create_task(session.post("/v1/completions", json=fields).__aenter__())
    await until(lambda: len(workers[1].received) == 1)
    signal.raise_signal(signal.SIGTERM)
    await asyncio.sleep(0.05)
    async with session.get("/health") as response:
        assert response.status == 503
    async with session.post("/v1/completions", json=fields) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (503, "draining")
    async with await request as response:
        assert response.status == (200 if finishes else 503)
    async with asyncio.timeout(5):
        await running["task"]


@pytest.mark.parametrize("running", [3600.0], indirect=True)
async def test_the_second_signal_ends_open_requests(running: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    session, workers = running["session"], running["workers"]
    await ready(session)
    workers[1].behaviour.hang = True
    fields = {"model": "fake", "prompt": "hello", "max_tokens": 20}
    answer = asyncio.create_task(session.post("/v1/completions", json=fields).__aenter__())
    await until(lambda: len(workers[1].received) == 1)
    signal.raise_signal(signal.SIGINT)
    await until(lambda: "draining: 1 request open, 3600 s left; Ctrl-C again ends it" in caplog.text)
    assert not answer.done()
    signal.raise_signal(signal.SIGINT)
    async with asyncio.timeout(30):
        async with await answer as response:
            assert response.status == 503
        await running["task"]


async def test_a_taken_port_fails_at_once(tmp_path: Path) -> None:
    listener = bind("127.0.0.1", 0)
    listener.listen()
    config = ClusterConfig.model_validate(
        {
            "model": str(tmp_path / "nowhere"),
            "hostname": "127.0.0.1",
            "port": listener.getsockname()[1],
            "context_servers": {},
            "generation_servers": {},
        }
    )
    with listener, pytest.raises(ListenError, match="can't listen"):
        await run(config)

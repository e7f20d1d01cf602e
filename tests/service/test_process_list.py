"""`pdserve ps`, and what else asks a running cluster: without a model, and with a reason where nothing answers."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from pdserve.cli import main
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.errors import StoreError
from pdserve.http import bind
from pdserve.process_list import Found, as_table, collect
from tests.cluster import free_ports
from tests.manager import TestManager, worker


def config(manager_port: int, proxy_port: int) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "model": "any",
            "hostname": "127.0.0.1",
            "port": proxy_port,
            "manager": {"hostname": "127.0.0.1", "port": manager_port},
            "context_servers": {},
            "generation_servers": {},
        }
    )


@asynccontextmanager
async def answering(status: int, **answer: Any) -> AsyncIterator[int]:
    """A server whose /health gives this answer; its port."""

    async def health(_: web.Request) -> web.Response:
        return web.Response(status=status, **answer)

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app)
    await runner.setup()
    listener = bind("127.0.0.1", 0)
    await web.SockSite(runner, listener).start()
    yield listener.getsockname()[1]
    await runner.cleanup()


@pytest.fixture
def flags() -> list[str]:
    """Of a cluster that does not run."""
    manager, proxy = free_ports(2)
    return [f"--manager.port={manager}", f"--port={proxy}"]


def test_nothing_up_is_a_line_and_a_failure(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", *flags]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    [line] = err.splitlines()
    assert line.startswith("pdserve: nothing is up: manager at http://localhost:")
    assert line.count("connection refused") == 2


def test_json_has_the_rows_all_the_same(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["ps", "--json", *flags]) == 1
    assert [row["state"] for row in json.loads(capfd.readouterr().out)] == ["down", "down"]


def test_a_measurement_needs_no_model_either(flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kv", "--from", "context-0", "--to", "generation-0", *flags]) == 1
    assert "the cluster manager at http://localhost:" in capfd.readouterr().err


def test_nor_does_a_manager(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["manager", "--manager.hostname=127.0.0.1", f"--manager.port={taken.getsockname()[1]}"]) != 0
    assert "model" not in capfd.readouterr().err


@pytest.mark.parametrize("command", ["up", "proxy", "context", "config"])
def test_whoever_serves_a_model_must_name_it(command: str, flags: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, *flags]) == 2
    assert "model: required" in capfd.readouterr().err


async def test_all_is_listed_where_all_is_up() -> None:
    async with TestManager() as manager, answering(200, text='{"pid": 7}') as proxy_port:
        async with ClusterClient(manager.url) as client:
            await client.register(worker("context-0", pid=9))
        found = await collect(config(manager.port, proxy_port))
    assert found.problem is None
    assert [(row.name, row.pid, row.state) for row in found.rows[1:]] == [
        ("proxy", 7, "ready"),
        ("context-0", 9, "ready"),
    ]
    assert len(as_table(found.rows).splitlines()) == 4


async def test_a_manager_that_is_down_leaves_the_workers_unknown() -> None:
    async with answering(503, text='{"pid": 7}') as proxy_port:
        found = await collect(config(free_ports(1)[0], proxy_port))
    assert [row.state for row in found.rows] == ["down", "not ready"]
    assert found.is_anything_up
    assert found.problem is not None
    assert found.problem.startswith("the workers are not known: manager at http://127.0.0.1:")


@pytest.mark.parametrize("answer", [{"text": "hello"}, {"text": "[1]"}, {"text": "{}"}, {"body": b"\xff\xfe"}])
async def test_another_program_on_the_port_is_not_taken_for_a_cluster(answer: dict[str, Any]) -> None:
    async with answering(200, **answer) as port:
        found = await collect(config(port, port))
    assert not found.is_anything_up
    assert (found.problem or "").count("what answers there is not pdserve") == 2


async def test_a_store_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    async with TestManager() as manager, answering(200, text='{"pid": 7}') as proxy_port:

        async def fail(*_: Any) -> Any:
            raise StoreError("etcd does not answer")

        for read in ("get", "scan"):
            monkeypatch.setattr(manager.store, read, fail)
        found = await collect(config(manager.port, proxy_port))
    assert "etcd does not answer" in (found.problem or "")


async def test_silence_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pdserve.process_list._TIMEOUT_S", 0.2)
    server = await asyncio.start_server(lambda *_: asyncio.sleep(3600), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    found: Found = await collect(config(port, port))
    server.close()
    assert (found.problem or "").count("no answer within 0.2 s") == 2

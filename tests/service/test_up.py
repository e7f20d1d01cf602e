"""`pdserve` processes and what is around them: a log that nobody reads, a terminal that goes, addresses of others.

A cluster without workers does: its manager and proxy are ready at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web

from pdserve.config import load
from pdserve.http import bind, start
from pdserve.readiness import Readiness
from tests.cluster import free_ports
from tests.fakes.proxy_cluster import byte_level_tokenizer
from tests.manager import until, worker

PDSERVE = [sys.executable, "-m", "pdserve"]


@pytest.fixture
def flags(tmp_path: Path) -> dict[str, Any]:
    """A cluster without workers, on free ports."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 300, "eos_token_id": 2}))
    byte_level_tokenizer().save(str(model / "tokenizer.json"))
    proxy, manager = free_ports(2)
    none = {"context_servers.num_instances": 0, "generation_servers.num_instances": 0}
    return {"model": model, "port": proxy, "manager.port": manager, **none}


def command(name: str, flags: dict[str, Any]) -> list[str]:
    return [*PDSERVE, name, *(f"--{key}={value}" for key, value in flags.items())]


def health(port: int) -> dict[str, Any] | None:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as response:
            return dict(json.load(response))
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


async def answers(port: int) -> None:
    async def is_ready() -> bool:
        return await asyncio.to_thread(health, port) is not None

    await until(is_ready, limit_s=60)


def hear_the_terminal() -> None:
    """Undo, in a child, what these tests were started with: under `nohup` every child ignores the end of a terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@contextlib.contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process; it and those below it are gone afterwards."""
    process = subprocess.Popen(argv, text=True, start_new_session=True, preexec_fn=hear_the_terminal, **options)
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=30)
        for each in alive:
            each.kill()
        assert not alive


def stuck() -> int:
    """The end of a full pipe whose other end stays open, and is not read."""
    _, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, b"x" * 4096)
    os.set_blocking(theirs, True)
    return theirs


def broken() -> int:
    ours, theirs = os.pipe()
    os.close(ours)
    return theirs


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(("name", "output"), [("up", stuck), ("up", broken), ("up", full_disk), ("manager", stuck)])
async def test_a_log_that_takes_nothing_stops_no_process(name: str, output: Any, flags: dict[str, Any]) -> None:
    descriptor = output()
    with running(command(name, {**flags, "log_level": "debug"}), stdout=descriptor, stderr=descriptor) as process:
        os.close(descriptor)
        await answers(flags["manager.port"])
        if name == "up":
            await answers(flags["port"])
        assert health(flags["manager.port"]) is not None, "and it has said so in its log"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0


async def test_closed_standard_descriptors_are_no_place_for_sockets(flags: dict[str, Any]) -> None:
    shell = ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command("manager", flags)]
    with running(shell) as process:
        await answers(flags["manager.port"])
        names = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert names == ["/dev/null"] * 3
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0


async def test_the_end_of_its_terminal_drains_a_cluster_and_no_file_is_left(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with running(command("up", flags), stdout=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary)}) as process:
        await answers(flags["port"])
        assert list(temporary.iterdir()) == [], "the configuration is in no file"
        seen = [part for each in psutil.Process(process.pid).children() for part in each.cmdline()]
        assert seen.count("-") == 2
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.05)
        process.send_signal(signal.SIGHUP)  # the terminal says it, and its shell
        output, _ = await asyncio.to_thread(process.communicate, None, 60)
    assert process.returncode == 0
    assert "INFO cluster_manager.server: stopped" in output
    assert "shutting down" in output
    assert "killing" not in output
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["manager", "proxy"])
async def test_each_process_drains_at_the_end_of_its_terminal(name: str, flags: dict[str, Any]) -> None:
    port = flags["manager.port" if name == "manager" else "port"]
    with running(command(name, flags), stderr=subprocess.PIPE) as process:
        await answers(port)
        process.send_signal(signal.SIGHUP)
        assert await asyncio.to_thread(process.wait, 60) == 0


def test_a_process_that_is_to_outlive_its_terminal_does() -> None:
    code = "from pdserve.process import stop_signals; print([number.name for number in stop_signals()])"
    for shell, names in (("nohup", "['SIGTERM', 'SIGINT']"), ("env", "['SIGTERM', 'SIGINT', 'SIGHUP']")):
        argv = [shell, sys.executable, "-c", code]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            preexec_fn=hear_the_terminal,
        )
        assert done.stdout.strip() == names


async def test_a_flag_beats_a_variable_in_the_children_too(flags: dict[str, Any]) -> None:
    """Beside a Kubernetes service of our own name."""
    elsewhere, manager = free_ports(2)
    variables = {"PDSERVE_PORT": str(elsewhere), "PDSERVE_MANAGER__PORT": str(manager), "PDSERVE_LOG_LEVEL": "debug"}
    service = {"PDSERVE_SERVICE_HOST": "10.0.0.1", "PDSERVE_MANAGER_PORT": "tcp://10.0.0.1:8001"}
    environment = {**os.environ, **variables, **service}
    with running(command("up", flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment):
        await answers(flags["port"])
        await answers(flags["manager.port"])
        assert health(elsewhere) is None
        assert health(manager) is None


async def test_a_taken_port_ends_the_start_with_a_line_that_names_it_and_its_holder(flags: dict[str, Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, key in (("up", "port"), ("manager", "manager.port")):
            argv = command(name, {**flags, key: port})
            done = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60)
            assert done.returncode == 3
            last = done.stderr.splitlines()[-1]
            assert f"can't listen on localhost:{port}: Address already in use by pid {os.getpid()}" in last
            assert "Traceback" not in done.stderr
            assert "ready" not in done.stdout


def test_two_parts_on_one_port_end_the_start(flags: dict[str, Any]) -> None:
    argv = command("up", {**flags, "manager.port": flags["port"]})
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert f"proxy can't listen on localhost:{flags['port']}" in done.stderr


def test_a_lack_of_descriptors_is_not_a_bad_configuration(flags: dict[str, Any]) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))

    done = subprocess.run(
        command("manager", flags), capture_output=True, text=True, timeout=60, check=False, preexec_fn=few
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "pdserve: [Errno 24] Too many open files"
    assert "Traceback" not in done.stderr


async def test_only_the_process_that_was_started_is_ready(flags: dict[str, Any]) -> None:
    """Other clusters answer at the same addresses, and workers of theirs have the same names."""
    name_key = web.AppKey("name", str)
    instance = {"manager": "m1", "proxy": "p1", "context-0": "c1"}

    async def say(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "instance": instance[request.app[name_key]]})

    async def workers(_: web.Request) -> web.Response:
        infos = [worker(name, url=url).model_dump() for name, url in records]
        return web.json_response({"revision": 1, "workers": [{"info": info, "state": "ready"} for info in infos]})

    records: list[tuple[str, str]] = []
    runners = []
    ports: dict[str, int] = {}
    for name in instance:
        app = web.Application()
        app[name_key] = name
        app.router.add_get("/health", say)
        app.router.add_get("/v1/workers", workers)
        listener = bind("localhost", 0)
        ports[name] = listener.getsockname()[1]
        runners.append(await start(app, listener))
    records += [("context-0.other", f"http://localhost:{ports['manager']}")]
    records += [("context-0", f"http://localhost:{ports['context-0']}")]
    config = load([], ["--model=m", f"--port={ports['proxy']}", f"--manager.port={ports['manager']}"])
    async with Readiness(config) as readiness:
        assert await readiness.ready(dict(instance)) == set(instance)
        others = {"manager": "m2", "proxy": "p1", "context-0": "c2", "generation-0": "g"}
        assert await readiness.ready(others) == {"proxy"}
    for runner in runners:
        await runner.cleanup()


async def test_every_process_says_its_identity(flags: dict[str, Any]) -> None:
    with running(command("up", flags), stdout=subprocess.PIPE):
        await answers(flags["port"])
        first = [health(flags[key]) for key in ("manager.port", "port")]
        identities = {body["instance"] for body in first if body}
        assert len(identities) == 2
        assert all(re.fullmatch("[0-9a-f]{32}", identity) for identity in identities)
        manager = first[0]
        assert manager is not None
        os.kill(manager["pid"], signal.SIGKILL)

        async def another() -> bool:
            body = await asyncio.to_thread(health, flags["manager.port"])
            return body is not None and body["instance"] not in identities

        await until(another, limit_s=60)

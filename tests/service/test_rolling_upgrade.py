"""A cluster whose processes are replaced one by one by those of another release, older or newer, while it serves.

The first release runs from its own wheel. The engine is a fake that both releases' workers can be started with.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.cluster import free_ports
from tests.etcd_server import EtcdServer
from tests.fakes.proxy_cluster import byte_level_tokenizer
from tests.first_release.wheel import first_release, this_release
from tests.manager import until

pytestmark = pytest.mark.slow

_PROGRAMS = {
    "manager": "from pdserve.cli import main; sys.exit(main(['manager', '-c', sys.argv[1]]))",
    "proxy": "from pdserve.cli import main; sys.exit(main(['proxy', '-c', sys.argv[1]]))",
    "worker": "from pathlib import Path; from pdserve.config import load;"
    "from pdserve.process import configure_logging;"
    "from pdserve.worker.launch import run_worker; configure_logging('info');"
    "sys.exit(run_worker(load([Path(sys.argv[1])]), 'generation', 0, 'tests.fakes.fake_engine'))",
}


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    return {"first": first_release(tmp_path_factory.mktemp("first")), "this": this_release()}


class Site:
    """The processes of one cluster, each of any release, and how to ask them."""

    def __init__(self, folder: Path, releases: dict[str, list[Path]], session: aiohttp.ClientSession) -> None:
        self._folder = folder
        self._releases = releases
        self._session = session
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.proxy_port, *self.manager_ports = free_ports(3)
        byte_level_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "config.json").write_text('{"vocab_size": 300, "eos_token_id": 2}')

    async def start(self, name: str, release: str, manager: int = 0, uri: str = "memory://") -> None:
        """Start a process, in the place of one of the same name."""
        await self.stop(name)
        file = self._folder / f"{name}.json"
        file.write_text(json.dumps(self._config(manager, uri)))
        kind = name.partition("-")[0]
        with (self._folder / f"{name}.log").open("ab") as log:
            self._running[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-c", f"import sys; {_PROGRAMS[kind]}", str(file)),
                cwd=self._folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, self._releases[release])),
                    "PYTHONSAFEPATH": "1",
                },
                stderr=log,
            )

    async def stop(self, name: str) -> int | None:
        """Tell a process to end; its status."""
        process = self._running.pop(name, None)
        if process is None:
            return None
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(process.wait(), 30)

    async def stop_all(self) -> None:
        for name in list(self._running):
            await self.stop(name)

    async def ended(self, name: str) -> int:
        return await asyncio.wait_for(self._running[name].wait(), 30)

    async def answers(self) -> bool:
        """Whether a request gets through, to its last token."""
        body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
        try:
            async with self._session.post(f"http://localhost:{self.proxy_port}/v1/completions", json=body) as response:
                if response.status != 200:
                    return False
                assert (await response.json())["choices"][0]["token_ids"] == [6, 7, 8, 6, 7]
                return True
        except aiohttp.ClientConnectionError:
            return False

    async def listed(self, manager: int = 0) -> list[Any]:
        """Workers as a manager lists them, [] while it can't."""
        url = f"http://localhost:{self.manager_ports[manager]}/v1/workers"
        try:
            async with self._session.get(url) as response:
                return (await response.json())["workers"] if response.status == 200 else []
        except aiohttp.ClientConnectionError:
            return []

    async def drain(self, worker_id: str, manager: int = 0) -> None:
        url = f"http://localhost:{self.manager_ports[manager]}/v1/workers/{worker_id}/drain"
        async with self._session.post(url) as response:
            assert response.status == 200, await response.text()

    def logs(self) -> str:
        return "".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self._folder.glob("*.log")))

    def _config(self, manager: int, uri: str) -> dict[str, Any]:
        limits = {"heartbeat_interval_sec": 0.5, "inactive_timeout_sec": 3, "drain_timeout_sec": 5}
        return {
            "model": str(self._folder),
            "port": self.proxy_port,
            "manager": {"port": self.manager_ports[manager]},
            "proxy": {"served_model_name": "m"},
            "disagg_cluster": {"cluster_uri": uri, **limits},
            "context_servers": {"num_instances": 0},
            "generation_servers": {},
        }


@asynccontextmanager
async def site(folder: Path, releases: dict[str, list[Path]]) -> AsyncIterator[Site]:
    async with aiohttp.ClientSession() as session:
        made = Site(folder, releases, session)
        try:
            yield made
        except BaseException:
            sys.stderr.write(made.logs())
            raise
        finally:
            await made.stop_all()


@pytest.mark.parametrize("order", [("manager", "proxy", "worker"), ("worker", "proxy", "manager")], ids="-".join)
@pytest.mark.parametrize(("old", "new"), [("first", "this"), ("this", "first")], ids=["upgrade", "downgrade"])
async def test_processes_are_replaced_one_by_one(
    tmp_path: Path, releases: dict[str, list[Path]], old: str, new: str, order: tuple[str, ...]
) -> None:
    async with site(tmp_path, releases) as cluster:
        for name in order:
            await cluster.start(name, old)
        await until(cluster.answers, limit_s=60)
        for name in order:
            await cluster.start(name, new)
            await until(cluster.answers, limit_s=60)

            async def is_listed() -> bool:
                return [each["info"]["worker_id"] for each in await cluster.listed()] == ["generation-0"]

            await until(is_listed, limit_s=60)
            assert await cluster.answers()
        await cluster.drain("generation-0")
        await cluster.ended("worker")


@pytest.mark.etcd
@pytest.mark.parametrize("worker", ["first", "this"])
async def test_managers_of_two_releases_share_a_store(
    tmp_path: Path, releases: dict[str, list[Path]], own_etcd_server: EtcdServer, worker: str
) -> None:
    """Whichever a worker goes to, both list it, and a proxy of either follows it; its heartbeats go to both in turn."""
    uri = own_etcd_server.uri
    folder = tmp_path / "site"
    folder.mkdir()
    async with site(folder, releases) as cluster:
        await cluster.start("manager-first", "first", 0, uri)
        await cluster.start("manager-this", "this", 1, uri)
        for manager, proxy in ((0, "this"), (1, "first"), (1, "this"), (0, "first")):
            await cluster.start("worker", worker, manager, uri)
            await cluster.start("proxy", proxy, 1 - manager, uri)
            await until(cluster.answers, limit_s=60)

            async def is_listed_by_both() -> bool:
                lists = [await cluster.listed(number) for number in (0, 1)]
                return all([each["info"]["worker_id"] for each in listed] == ["generation-0"] for listed in lists)

            await until(is_listed_by_both, limit_s=60)
            await cluster.drain("generation-0", 1 - manager)
            await cluster.ended("worker")

            async def is_gone() -> bool:
                return not await cluster.listed(0) and not await cluster.listed(1)

            await until(is_gone, limit_s=60)

"""Runs the soak and prints what grew.

Exit status 1 if a process grew by more than the limit over the second half, etcd's database is larger than its limit,
an answer was wrong, a request failed, or a guest did not come or go as it should.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from tests.cluster import free_ports, get_json
from tests.etcd_server import EtcdServer
from tests.soak.churn import Churn
from tests.soak.load import Load
from tests.soak.model import configuration, write_model
from tests.soak.nursery import SOCKET_VARIABLE
from tests.soak.sampling import MIB, Series, Watch, etcd_bytes, growth

PLACES = 4
"""Workers of each role; the first stays, the others are guests."""
GROWTH_LIMIT = 0.05
ETCD_LIMIT_BYTES = 50 * MIB
START_TIMEOUT_S = 120.0
PROGRESS_S = 20.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--incarnations", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the logs; a temporary one otherwise")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pdserve-soak-")))
        folder.mkdir(parents=True, exist_ok=True)
        etcd = stack.enter_context(EtcdServer(folder))
        proxy_port, manager_port = free_ports(2)
        config = configuration(write_model(folder / "model"), (proxy_port, manager_port), etcd.uri, PLACES)
        file = folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(config))
        nursery = folder / "nursery"
        environment = {**os.environ, SOCKET_VARIABLE: str(nursery), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        stack.enter_context(_running(folder, "nursery", ["tests.soak.nursery", str(nursery)], environment))
        residents = {
            name: stack.enter_context(_running(folder, name, ["pdserve", *command, "-c", str(file)], environment))
            for name, command in {
                "manager": ["manager"],
                "proxy": ["proxy"],
                "context-0": ["context", "--index=0"],
                "generation-0": ["generation", "--index=0"],
            }.items()
        }
        proxy_url, manager_url = f"http://localhost:{proxy_port}", f"http://localhost:{manager_port}"
        _wait_ready(f"{proxy_url}/health", nursery, residents, folder)
        churn = Churn(str(nursery), file, manager_url, chosen.incarnations, _guests(), chosen.seed)
        load = Load(
            proxy_url,
            "model",
            chosen.requests,
            chosen.seed,
            may_send=lambda share: share <= churn.registered / chosen.incarnations + 0.01,
        )
        watch = Watch([each for name, process in residents.items() for each in _series(name, process.pid)])
        asyncio.run(_soak(churn, load, watch))
        return _judge(churn, load, watch, etcd_bytes(etcd.endpoint))


def _guests() -> list[tuple[str, int]]:
    return [(role, index) for role in ("context", "generation") for index in range(1, PLACES)]


async def _soak(churn: Churn, load: Load, watch: Watch) -> None:
    watching = asyncio.create_task(watch.run())
    telling = asyncio.create_task(_tell(churn, load))
    asking = asyncio.create_task(load.run())
    await churn.run()
    if churn.failures:
        load.total = load.sent
    await asking
    for task in (watching, telling):
        task.cancel()
    await asyncio.gather(watching, telling, return_exceptions=True)


async def _tell(churn: Churn, load: Load) -> None:
    began_s = time.monotonic()
    while True:
        await asyncio.sleep(PROGRESS_S)
        passed_s = time.monotonic() - began_s
        print(f"{passed_s:.0f} s: {churn.registered} incarnations, {load.answered} answers", flush=True)


def _judge(churn: Churn, load: Load, watch: Watch, database_bytes: int) -> int:
    print(watch.table())
    print(f"{churn.registered} incarnations: {churn.drained} drained, {churn.killed} killed")
    print(
        f"{load.sent} requests: {load.answered} answered, {load.wrong} of them wrong, {load.cancelled} cancelled, "
        f"{sum(load.refused.values())} failed"
    )
    for why, count in sorted(load.refused.items(), key=lambda each: -each[1])[:5]:
        print(f"  {count} x {why}")
    print(f"etcd's database: {database_bytes / MIB:.1f} MiB; {time.monotonic() - watch.began_s:.0f} s")
    faults = list(churn.failures)
    faults += [f"{each.name} grew" for each in watch.series if growth(each.resident) > GROWTH_LIMIT]
    faults += ["etcd's database is too large"] * (database_bytes > ETCD_LIMIT_BYTES)
    faults += ["answers were wrong"] * bool(load.wrong) + ["requests failed"] * bool(load.refused)
    for fault in faults:
        print(f"FAULT: {fault}")
    return 1 if faults else 0


@contextlib.contextmanager
def _running(
    folder: Path, name: str, module_and_arguments: list[str], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments], stdout=log, stderr=log, env=environment
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_ready(url: str, nursery: Path, residents: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        for name, process in residents.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended:\n{(folder / f'{name}.log').read_text()[-2000:]}")
        with contextlib.suppress(OSError):
            get_json(url)
            if nursery.exists():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"the cluster is not ready after {START_TIMEOUT_S:g} s")
        time.sleep(0.2)


def _series(name: str, pid: int) -> list[Series]:
    """A server's process and, of a worker, its engine's."""
    process = psutil.Process(pid)
    return [Series(name, process), *(Series(f"{name} engine", child) for child in process.children())]


if __name__ == "__main__":
    sys.exit(main())

"""What `pdserve ps` shows: the manager, the proxy, and the workers that the manager knows."""

from __future__ import annotations

import asyncio
import os
import time
from typing import NamedTuple

import aiohttp

from pdserve.addresses import http_url
from pdserve.cluster_api import WorkerLoad, WorkerRecord
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.errors import PdserveError

_TIMEOUT_S = 3.0


class Row(NamedTuple):
    name: str
    role: str
    pid: int
    state: str
    address: str
    device: str = ""
    running: int = 0
    waiting: int = 0
    blocks_available: int = 0
    blocks_total: int = 0
    uptime_s: int = 0


class Found(NamedTuple):
    """`problem` says why the list is not whole, in a line; None if it is."""

    rows: list[Row]
    problem: str | None

    @property
    def is_anything_up(self) -> bool:
        return any(row.state != "down" for row in self.rows)


async def collect(config: ClusterConfig) -> Found:
    """One row a process; a manager or proxy that does not answer is shown as "down"."""
    manager_url = http_url(config.manager.hostname, config.manager.port)
    proxy_url = http_url(config.hostname, config.port)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session:
        manager, proxy = await asyncio.gather(
            _server(session, "manager", manager_url), _server(session, "proxy", proxy_url)
        )
        rows = [manager.row, proxy.row]
        if manager.reason and proxy.reason:
            return Found(rows, f"nothing is up: {manager.reason}; {proxy.reason}")
        try:
            listed = (await ClusterClient(manager_url, session, _TIMEOUT_S).workers()).workers
        except PdserveError as error:
            return Found(rows, f"the workers are not known: {manager.reason or error}")
        workers = await asyncio.gather(*(_with_load(session, record) for record in listed))
    return Found(rows + [_worker(record) for record in sorted(workers, key=lambda w: w.info.worker_id)], None)


def as_table(rows: list[Row]) -> str:
    """`rows` in aligned columns."""
    header = ("NAME", "ROLE", "PID", "STATE", "ADDRESS", "DEVICE", "RUNNING", "WAITING", "KV BLOCKS", "UP")
    lines = [header] + [
        (
            row.name,
            row.role,
            str(row.pid or "-"),
            row.state,
            row.address,
            row.device or "-",
            str(row.running) if row.blocks_total else "-",
            str(row.waiting) if row.blocks_total else "-",
            f"{row.blocks_available}/{row.blocks_total}" if row.blocks_total else "-",
            f"{row.uptime_s} s" if row.uptime_s else "-",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


class _Answer(NamedTuple):
    """`reason` says why a process counts as down."""

    row: Row
    reason: str | None = None


async def _server(session: aiohttp.ClientSession, name: str, url: str) -> _Answer:
    try:
        async with session.get(f"{url}/health") as response:
            body = await response.json(content_type=None)
            state = "ready" if response.status == 200 else "not ready"
    except aiohttp.ClientConnectorError as error:
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
    except TimeoutError:
        reason = f"no answer within {_TIMEOUT_S:g} s"
    except (aiohttp.ClientError, ValueError):
        reason = "what answers there is not pdserve"
    else:
        if isinstance(body, dict) and isinstance(pid := body.get("pid"), int):
            return _Answer(Row(name, name, pid, state, url))
        reason = "what answers there is not pdserve"
    return _Answer(Row(name, name, 0, "down", url), f"{name} at {url}: {reason}")


async def _with_load(session: aiohttp.ClientSession, record: WorkerRecord) -> WorkerRecord:
    """`record` with its load; a worker whose heartbeats another manager hears is asked itself."""
    load = record.load
    if load is None:
        try:
            async with session.get(f"{record.info.url}/health") as response:
                load = WorkerLoad.model_validate((await response.json(content_type=None)).get("load"))
        except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError):
            return record
    return record.model_copy(update={"load": load})


def _worker(record: WorkerRecord) -> Row:
    info, load = record.info, record.load or WorkerLoad()
    return Row(
        info.worker_id,
        info.role,
        info.pid,
        record.state,
        info.url,
        info.device,
        load.running,
        load.waiting,
        load.blocks_available,
        load.blocks_total,
        int(time.time() - info.started_at),
    )

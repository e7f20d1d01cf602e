"""What `pdserve ps` shows: the manager, the proxy, and the workers that the manager knows."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import aiohttp

from pdserve.cluster_api import WorkerList, WorkerRecord
from pdserve.config import ClusterConfig

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)


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


async def collect(config: ClusterConfig) -> list[Row]:
    """One row a process; a manager or proxy that does not answer is shown as "down"."""
    manager_url = f"http://{config.manager.hostname}:{config.manager.port}"
    proxy_url = f"http://{config.hostname}:{config.port}"
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        rows = [await _server(session, "manager", manager_url), await _server(session, "proxy", proxy_url)]
        if rows[0].state != "down":
            async with session.get(f"{manager_url}/v1/workers") as response:
                if response.status == 200:
                    workers = WorkerList.model_validate_json(await response.read()).workers
                    rows += [_worker(record) for record in sorted(workers, key=lambda w: w.info.worker_id)]
    return rows


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


async def _server(session: aiohttp.ClientSession, name: str, url: str) -> Row:
    try:
        async with session.get(f"{url}/health") as response:
            body: dict[str, Any] = await response.json(content_type=None)
            state = "ready" if response.status == 200 else "not ready"
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return Row(name, name, 0, "down", url)
    return Row(name, name, int(body.get("pid", 0)), state, url)


def _worker(record: WorkerRecord) -> Row:
    info, load = record.info, record.load
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

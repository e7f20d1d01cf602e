"""A cluster manager inside the test's own event loop, and what its readers need."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from cluster_manager.server import Manager
from cluster_manager.store import Store, open_store
from pdserve.addresses import http_url
from pdserve.cluster_api import WatchEvent, WorkerInfo, WorkerRecord
from pdserve.config import DisaggCluster
from pdserve.http import bind

BOOKMARK_INTERVAL_S = 0.2


class TestManager:
    """A manager on a free port, running inside `async with`; `port` moves a restarted one to its old place."""

    __test__ = False

    def __init__(
        self,
        store: Store | None = None,
        uri: str = "memory://",
        name: str = "test",
        port: int = 0,
        host: str = "127.0.0.1",
        **cluster: Any,
    ) -> None:
        cluster = {"heartbeat_interval_sec": 0.1, "inactive_timeout_sec": 1.0, **cluster}
        self.config = DisaggCluster(cluster_uri=uri, cluster_name=name, **cluster)
        self.store = store or open_store(uri)
        listener = bind(host, port)
        self.port = listener.getsockname()[1]
        self.url = http_url(host, self.port)
        self._manager = Manager(self.config, self.store, listener, BOOKMARK_INTERVAL_S)
        self.app = self._manager.app

    async def __aenter__(self) -> TestManager:
        await self._manager.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._manager.__aexit__(None, None, None)
        if self.config.cluster_uri != "memory://":
            await asyncio.sleep(0.05)  # gRPC's last words must not reach a closed event loop


class Replica:
    """The cluster as a stream of events tells it; refuses events that no correct stream contains."""

    def __init__(self) -> None:
        self.workers: dict[str, WorkerRecord] = {}
        self.revision = 0
        self.snapshots = 0
        self.seen: list[WatchEvent] = []

    def apply(self, event: WatchEvent) -> None:
        self.seen.append(event)
        if event.type == "snapshot":
            assert event.workers is not None
            assert event.epoch
            self.snapshots += 1
            self.workers = {record.info.worker_id: record for record in event.workers}
        elif event.type == "bookmark":
            assert event.revision >= self.revision, "a bookmark is no step back"
        else:
            assert self.snapshots, "a stream starts with a snapshot"
            assert event.revision > self.revision, f"{event} was seen before"
            assert event.worker_id is not None
            if event.type == "put":
                assert event.worker is not None
                self.workers[event.worker_id] = event.worker
            else:
                del self.workers[event.worker_id]  # fails if its put was lost
        self.revision = event.revision

    async def follow(self, events: AsyncGenerator[WatchEvent, None]) -> None:
        async for event in events:
            self.apply(event)


def worker(worker_id: str, incarnation: str = "1", role: str = "context", **fields: Any) -> WorkerInfo:
    """A worker's registration."""
    return WorkerInfo.model_validate(
        {
            "worker_id": worker_id,
            "incarnation": incarnation,
            "role": role,
            "url": "http://127.0.0.1:1",
            "model": "m",
            "max_seq_len": 128,
            "tokens_per_block": 32,
            "started_at": 0.0,
            **fields,
        }
    )


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], limit_s: float = 30.0) -> float:
    """Wait for a condition; returns how long it took, in seconds."""
    started = time.monotonic()
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return time.monotonic() - started
        assert time.monotonic() - started < limit_s, f"still not so after {limit_s} s"
        await asyncio.sleep(0.02)

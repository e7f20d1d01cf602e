"""The manager's own view of the cluster: for its log and its gauges, never for an answer.

Owns a watch like any other reader's, from start to cancellation. It tells a worker that lapsed from one that left by
what was deregistered through this manager.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import get_args

from cluster_manager.feed import Feed
from cluster_manager.metrics import Metrics
from cluster_manager.registry import Registry
from cluster_manager.store import StoreError
from pdserve.cluster_api import BOOKMARK_INTERVAL_S, WatchEvent, WorkerRecord
from pdserve.errors import PdserveError
from pdserve.protocol import Role, WorkerState

log = logging.getLogger(__name__)

_RETRY_INTERVAL_S = 1.0


class Observer:
    """Follows the workers while `run` runs."""

    def __init__(self, registry: Registry, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics
        self._workers: dict[str, WorkerRecord] = {}
        self._leaving: set[str] = set()

    async def run(self) -> None:
        """Follow the store until cancelled, through all its outages."""
        waiting = False
        while True:
            try:
                async with aclosing(Feed(self._registry, BOOKMARK_INTERVAL_S).events()) as events:
                    async for event in events:
                        self._apply(event)
            except StoreError as error:
                log.log(logging.DEBUG if waiting else logging.WARNING, "waiting for the store: %s", error)
                waiting = True
                await asyncio.sleep(_RETRY_INTERVAL_S)

    @contextmanager
    def leaving(self, worker_id: str) -> Iterator[None]:
        """A worker is deregistered inside: if that succeeds, its disappearance is no expiry."""
        noted_before = worker_id in self._leaving
        self._leaving.add(worker_id)
        try:
            yield
        except PdserveError:
            if not noted_before:
                self._leaving.discard(worker_id)
            raise

    def _apply(self, event: WatchEvent) -> None:
        if event.type == "snapshot":
            workers = {record.info.worker_id: record for record in event.workers or []}
            for worker_id in self._workers.keys() | workers.keys():
                self._change(worker_id, workers.get(worker_id))
        elif event.worker_id is not None:
            self._change(event.worker_id, event.worker)
        self._set_gauges()

    def _change(self, worker_id: str, record: WorkerRecord | None) -> None:
        known = self._workers.pop(worker_id, None)
        if record is not None:
            self._workers[worker_id] = record
            if known is None or known.info.incarnation != record.info.incarnation:
                log.info(
                    "%s worker %s joined: %s, pid %d", record.info.role, worker_id, record.info.url, record.info.pid
                )
            elif known.state != record.state:
                log.info("worker %s is %s", worker_id, record.state)
        elif worker_id in self._leaving:
            self._leaving.discard(worker_id)
            log.info("worker %s left", worker_id)
        elif known is not None:
            log.warning("worker %s lapsed", worker_id)
            self._metrics.lease_expiries.labels(known.info.role).inc()

    def _set_gauges(self) -> None:
        counts = Counter((record.info.role, record.state) for record in self._workers.values())
        for role in get_args(Role):
            for state in get_args(WorkerState):
                self._metrics.workers.labels(role, state).set(counts[role, state])

"""The manager's Prometheus metrics, and the store wrapper that feeds some of them."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cluster_manager.store import Confirmed, Entry, Event, Lease, Store, StoreError

Result = TypeVar("Result")


class Metrics:
    """All metrics of one manager, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.workers = Gauge(
            "pdserve_manager_workers",
            "Live workers as this manager last saw them",
            ["role", "state"],
            registry=registry,
        )
        self.requests = Counter("pdserve_manager_requests", "Answered requests", ["route", "status"], registry=registry)
        self.watchers = Gauge("pdserve_manager_watchers", "Open watch streams", registry=registry)
        self.lease_expiries = Counter(
            "pdserve_manager_lease_expiries",
            "Workers that disappeared without leaving through this manager",
            ["role"],
            registry=registry,
        )
        self.store_seconds = Histogram(
            "pdserve_manager_store_seconds", "Time of one store operation", ["operation"], registry=registry
        )
        self.store_errors = Counter(
            "pdserve_manager_store_errors", "Store operations without an answer", ["operation"], registry=registry
        )


class MeteredStore:
    """A `Store` that times every call to another."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics

    async def grant(self, ttl_s: float) -> Lease:
        return await self._timed("grant", self._store.grant(ttl_s))

    async def keepalive(self, lease: Lease) -> None:
        await self._timed("keepalive", self._store.keepalive(lease))

    async def revoke(self, lease: Lease) -> None:
        await self._timed("revoke", self._store.revoke(lease))

    async def put(self, key: str, value: bytes, lease: Lease | None = None) -> int:
        return await self._timed("put", self._store.put(key, value, lease))

    async def put_if(
        self, key: str, value: bytes, expected_mod_revision: int, lease: Lease | None = None
    ) -> int | None:
        return await self._timed("put_if", self._store.put_if(key, value, expected_mod_revision, lease))

    async def delete(self, key: str) -> bool:
        return await self._timed("delete", self._store.delete(key))

    async def get(self, key: str) -> Entry | None:
        return await self._timed("get", self._store.get(key))

    async def scan(self, prefix: str) -> tuple[list[Entry], int]:
        return await self._timed("scan", self._store.scan(prefix))

    async def compact(self, revision: int) -> None:
        await self._timed("compact", self._store.compact(revision))

    async def watch(
        self, prefix: str, from_revision: int, confirm_interval_s: float
    ) -> AsyncGenerator[Event | Confirmed, None]:
        try:
            async with aclosing(self._store.watch(prefix, from_revision, confirm_interval_s)) as events:
                async for event in events:
                    yield event
        except StoreError:
            self._metrics.store_errors.labels("watch").inc()
            raise

    async def close(self) -> None:
        await self._store.close()

    async def _timed(self, operation: str, call: Awaitable[Result]) -> Result:
        started = time.perf_counter()
        try:
            return await call
        except StoreError:
            self._metrics.store_errors.labels(operation).inc()
            raise
        finally:
            self._metrics.store_seconds.labels(operation).observe(time.perf_counter() - started)

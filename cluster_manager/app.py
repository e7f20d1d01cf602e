"""The manager's REST routes.

Owns the HTTP side: bodies and queries in, JSON and streams of JSON lines out. What the routes mean is `registry`'s
and `feed`'s matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator
from typing import Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from cluster_manager.admission import check_registration
from cluster_manager.feed import Feed
from cluster_manager.metrics import Metrics
from cluster_manager.observer import Observer
from cluster_manager.registry import Registry
from cluster_manager.store import StoreError
from pdserve.cluster_api import (
    BOOKMARK_INTERVAL_S,
    ClusterStatus,
    HeartbeatReply,
    HeartbeatRequest,
    RegisterReply,
    RegisterRequest,
    RoleCount,
    Schema,
    WatchEvent,
    WorkerList,
    WorkerRecord,
)
from pdserve.cluster_versions import API_HEADER, API_VERSION, to_json, version_of
from pdserve.config import ClusterUri, DisaggCluster
from pdserve.http import Handler, errors_as_json, json_response, metrics_handler, read_body, read_query
from pdserve.openapi import JSON, TEXT, Operation, add_routes
from pdserve.process import instance
from pdserve.protocol import Role

log = logging.getLogger(__name__)

NDJSON = "application/x-ndjson"

WRITE_TIMEOUT_S = 10.0
_MAX_BODY_BYTES = 64 << 10


class ListQuery(Schema):
    """What people write: a misspelt name is a mistake."""

    model_config = ConfigDict(extra="forbid")

    role: Role | None = None


class LeaveQuery(Schema):
    lease_id: str


class WatchQuery(Schema):
    from_revision: int | None = Field(default=None, ge=1)
    epoch: str | None = None


class ManagerHealth(Schema):
    """`store` is "ok", or says why the store does not answer."""

    status: Literal["ok", "degraded"]
    store: str
    pid: int
    instance: str


class ManagerApp:
    """The routes over one registry. `closing` ends the watch streams."""

    def __init__(
        self,
        registry: Registry,
        observer: Observer,
        metrics: Metrics,
        cluster: DisaggCluster,
        bookmark_interval_s: float = BOOKMARK_INTERVAL_S,
    ) -> None:
        self._registry = registry
        self._observer = observer
        self._metrics = metrics
        self._cluster = cluster
        self._bookmark_interval_s = bookmark_interval_s
        self._closing = asyncio.Event()

    def build(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._count, errors_as_json], client_max_size=_MAX_BODY_BYTES)
        add_routes(app, "pdserve cluster manager", self._routes())
        app.on_response_prepare.append(_say_version)
        app.on_shutdown.append(self._close_watches)
        return app

    def _routes(self) -> list[tuple[Operation, Handler]]:
        worker = "/v1/workers/{worker_id}"
        record, status = {JSON: WorkerRecord}, {JSON: ClusterStatus}
        register = Operation(
            "POST", "/v1/workers", "Register a worker under a new lease", {JSON: RegisterReply}, RegisterRequest
        )
        beat = Operation("POST", f"{worker}/heartbeat", "Renew a lease", {JSON: HeartbeatReply}, HeartbeatRequest)
        watch = Operation(
            "GET", "/v1/watch", "List, then watch: a JSON line an event", {NDJSON: WatchEvent}, query=WatchQuery
        )
        return [
            (register, self._register),
            (Operation("GET", "/v1/workers", "The live workers", {JSON: WorkerList}, query=ListQuery), self._workers),
            (Operation("GET", worker, "One live worker", record), self._worker),
            (Operation("DELETE", worker, "Remove a worker", query=LeaveQuery, status=204), self._deregister),
            (beat, self._heartbeat),
            (Operation("POST", f"{worker}/drain", "Have a worker finish and leave", record), self._drain),
            (watch, self._watch),
            (Operation("GET", "/v1/cluster", "How many workers are there and needed", status), self._status),
            (Operation("GET", "/cluster_info", "The same as /v1/cluster", status), self._status),
            (Operation("GET", "/health", "Whether the store answers", {JSON: ManagerHealth}), self._health),
            (Operation("GET", "/metrics", "For Prometheus", {TEXT: None}), metrics_handler(self._metrics.registry)),
        ]

    async def _register(self, request: web.Request) -> web.Response:
        body = await read_body(request, RegisterRequest)
        check_registration(body.info)
        lease_id = await self._registry.register(body.info)
        cluster = self._cluster
        return _reply(
            request,
            RegisterReply(
                lease_id=lease_id,
                ttl_s=cluster.inactive_timeout_sec,
                heartbeat_interval_s=cluster.heartbeat_interval_sec,
            ),
        )

    async def _heartbeat(self, request: web.Request) -> web.Response:
        body = await read_body(request, HeartbeatRequest)
        record = await self._registry.heartbeat(request.match_info["worker_id"], body)
        return _reply(request, HeartbeatReply(state=record.state, ttl_s=self._cluster.inactive_timeout_sec))

    async def _deregister(self, request: web.Request) -> web.Response:
        query = read_query(request, LeaveQuery)
        worker_id = request.match_info["worker_id"]
        with self._observer.leaving(worker_id):
            await self._registry.deregister(worker_id, query.lease_id)
        return web.Response(status=204)

    async def _drain(self, request: web.Request) -> web.Response:
        return _reply(request, await self._registry.drain(request.match_info["worker_id"]))

    async def _worker(self, request: web.Request) -> web.Response:
        return _reply(request, await self._registry.worker(request.match_info["worker_id"]))

    async def _workers(self, request: web.Request) -> web.Response:
        query = read_query(request, ListQuery)
        listed = await self._registry.workers()
        if query.role is not None:
            chosen = [record for record in listed.workers if record.info.role == query.role]
            listed = WorkerList(revision=listed.revision, workers=chosen)
        return _reply(request, listed)

    async def _status(self, request: web.Request) -> web.Response:
        workers = (await self._registry.workers()).workers
        required = self._cluster.minimal_instances
        context = _count_role(workers, "context", required.context_servers)
        generation = _count_role(workers, "generation", required.generation_servers)
        return _reply(
            request,
            ClusterStatus(
                cluster_name=self._cluster.cluster_name,
                store=ClusterUri.parse(self._cluster.cluster_uri).scheme,
                ready=all(count.ready >= count.required for count in (context, generation)),
                context_servers=context,
                generation_servers=generation,
            ),
        )

    async def _health(self, _: web.Request) -> web.Response:
        try:
            await self._registry.epoch()
        except StoreError as error:
            degraded = ManagerHealth(status="degraded", store=error.message, pid=os.getpid(), instance=instance())
            return json_response(degraded, status=503, headers={"Retry-After": str(error.retry_after_s)})
        return json_response(ManagerHealth(status="ok", store="ok", pid=os.getpid(), instance=instance()))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        query = read_query(request, WatchQuery)
        feed = Feed(self._registry, self._bookmark_interval_s, query.from_revision, query.epoch)
        async with contextlib.aclosing(feed.events()) as events:
            first = await anext(events)
            response = web.StreamResponse(headers={"Content-Type": NDJSON, "Cache-Control": "no-store"})
            await response.prepare(request)
            with self._metrics.watchers.track_inprogress():
                await self._until_closing(request, response, first, events)
        return response

    async def _until_closing(
        self,
        request: web.Request,
        response: web.StreamResponse,
        first: WatchEvent,
        events: AsyncGenerator[WatchEvent, None],
    ) -> None:
        closing = asyncio.create_task(self._closing.wait())
        stream = asyncio.create_task(_write(request, response, first, events))
        try:
            await asyncio.wait({closing, stream}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            stream.cancel()
            await asyncio.gather(closing, stream, return_exceptions=True)
        if not stream.cancelled():
            stream.result()

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        status = 499  # what stays when the client went away first
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            resource = request.match_info.route.resource
            self._metrics.requests.labels(resource.canonical if resource else "unknown", str(status)).inc()

    async def _close_watches(self, _: web.Application) -> None:
        self._closing.set()


def _reply(request: web.Request, message: BaseModel) -> web.Response:
    """`message` in the form that the release of the asking process can read."""
    return web.Response(body=to_json(message, version_of(request.headers)), content_type="application/json")


async def _say_version(_: web.Request, response: web.StreamResponse) -> None:
    response.headers[API_HEADER] = str(API_VERSION)


async def _write(
    request: web.Request,
    response: web.StreamResponse,
    first: WatchEvent,
    events: AsyncGenerator[WatchEvent, None],
) -> None:
    """Send events as JSON lines until the reader goes away, or takes nothing for `WRITE_TIMEOUT_S`."""
    event, version = first, version_of(request.headers)
    try:
        while True:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await response.write(to_json(event, version) + b"\n")
            event = await anext(events)
    except ConnectionError:
        return
    except TimeoutError:
        log.warning("a watcher at %s does not read; its connection is closed", request.remote)
        if request.transport is not None:
            request.transport.abort()


def _count_role(workers: list[WorkerRecord], role: Role, required: int) -> RoleCount:
    states = [record.state for record in workers if record.info.role == role]
    return RoleCount(ready=states.count("ready"), draining=states.count("draining"), required=required)

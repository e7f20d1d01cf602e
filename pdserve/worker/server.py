"""A worker's server process: HTTP and sockets in front of one engine process.

Life cycle: the port is bound, the engine started; once it is warm the worker serves and registers. It ends when it
is told to (SIGTERM, or drained through the manager) after its requests have finished, or at once when it is told so
twice. When its engine ends, every open request is finished with an error that allows a retry elsewhere, and the
process exits with status 1 (2 if the configuration is at fault, so that nobody restarts it in vain). What is still
open when a drain's time is up is finished with an error that sends it elsewhere, with the tokens that it has. One that
was drained through the manager exits with a status of its own (`EXIT_DRAINED`): it is meant to stay away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Awaitable

from aiohttp import web

from pdserve.addresses import bare, dial_host, http_url, is_every_address
from pdserve.cluster_api import KvEndpoint, Schema, WorkerInfo, WorkerLoad
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig, LlmArgs, WorkerPool
from pdserve.draining import Stop, drain
from pdserve.errors import ConfigError, Draining, EngineError, NotReady, PdserveError, WorkerLost
from pdserve.http import bind, errors_as_json, json_response, metrics_handler, start
from pdserve.openapi import JSON, TEXT, Operation, add_routes
from pdserve.process import EXIT_CONFIG, EXIT_DRAINED, EXIT_FAILED, EXIT_OK, freeze_startup_objects, instance
from pdserve.protocol import EngineReady, EngineStats, LoadReport, OutputFrame, Role, WorkerState
from pdserve.worker.engine_link import EngineLink
from pdserve.worker.engine_watch import EngineWatch
from pdserve.worker.kv_bench import KvBench, KvBenchReply, KvBenchRequest
from pdserve.worker.membership import Membership
from pdserve.worker.metrics import registry
from pdserve.worker.streams import Streams

log = logging.getLogger(__name__)


class WorkerHealth(Schema):
    """`load` is null while the engine does not answer."""

    status: WorkerState
    worker_id: str
    pid: int
    instance: str
    load: WorkerLoad | None


class WorkerServer:
    """One worker. `engine_module` is the module whose main builds its engine."""

    def __init__(self, config: ClusterConfig, pool: WorkerPool, role: Role, index: int, engine_module: str) -> None:
        self._config = config
        self._pool = pool
        self._role: Role = role
        self._listener = bind(pool.hostname, pool.port + index if pool.port else 0)
        self._host = dial_host(pool.hostname, config.manager.hostname, config.manager.port)
        self.worker_id = worker_id(role, index, pool.hostname)
        args = LlmArgs.model_validate({key: getattr(pool, key) for key in LlmArgs.model_fields})
        dumped = args.model_dump(mode="json")
        self._link = EngineLink(engine_module, role, self.worker_id, dumped, pool.hostname, self._host)
        self._ready: EngineReady | None = None
        self._stats = EngineStats()
        self._state: WorkerState = "starting"
        self._incarnation = ""
        self._started_at = time.time()
        self._stop = Stop()
        self._stop_status = EXIT_OK
        self._streams = Streams(self._identity, self._admit, self._link.send, self._load_report)
        self._kv_bench = KvBench(role, self._admit, self._link.send)
        self._watch = EngineWatch(config.disagg_cluster.inactive_timeout_sec, self._hang_up)

    async def run(self) -> int:
        """Serve until told to stop or the engine ends; returns the exit status."""
        with self._stop.on_signals():
            return await self._run()

    async def _run(self) -> int:
        http = await start(self._app(), self._listener)
        try:
            return await self._serve()
        except ConfigError as error:
            log.error("%s", error)
            return EXIT_CONFIG
        except PdserveError as error:
            log.error("the engine ended: %s", error)
            self._streams.fail_all(WorkerLost(f"worker {self.worker_id} lost its engine"))
            return EXIT_FAILED
        finally:
            self._kv_bench.fail_all(WorkerLost(f"worker {self.worker_id} ends"))
            await self._streams.close()
            await http.cleanup()
            await self._link.stop()

    async def _serve(self) -> int:
        stopped = asyncio.create_task(self._stop.asked.wait())
        self._ready = await first(self._link.start(), stopped)
        if self._ready is None:
            return EXIT_OK
        freeze_startup_objects()
        self._state = "ready"
        log.info("%s is warm: %s, %s", self.worker_id, self._ready.device, self._ready.dtype)
        manager = self._config.manager
        async with ClusterClient(http_url(manager.hostname, manager.port)) as client:
            membership = Membership(client, self._make_info, self._load, self._on_drain)
            member = asyncio.create_task(membership.run())
            pump = asyncio.create_task(self._pump())
            watch = asyncio.create_task(self._watch.run())
            try:
                ended, _ = await asyncio.wait({stopped, pump, watch}, return_when=asyncio.FIRST_COMPLETED)
                for task in ended - {stopped}:
                    task.result()
                await self._drain(membership, pump)
            finally:
                for task in (member, pump, watch, stopped):
                    task.cancel()
                await asyncio.gather(member, pump, watch, stopped, return_exceptions=True)
                with contextlib.suppress(PdserveError):
                    await membership.leave()
        return self._stop_status

    def _on_drain(self) -> None:
        """The manager asks to drain."""
        if not self._stop.asked.is_set():
            self._stop_status = EXIT_DRAINED
        self._stop.ask()

    async def _drain(self, membership: Membership, pump: asyncio.Task[None]) -> None:
        self._state = "draining"
        self._streams.broadcast(self._load_report())
        with contextlib.suppress(PdserveError):
            await membership.leave()
        timeout_s = self._config.disagg_cluster.drain_timeout_sec
        await drain(log, self._stop, self._idle(pump), lambda: self._streams.open_requests, timeout_s)
        log.info("drained with %d requests open", self._streams.open_requests)
        self._streams.fail_all(Draining(f"{self.worker_id} has drained"))

    async def _idle(self, pump: asyncio.Task[None]) -> None:
        """Until no request is open, or nothing more can come of those that are."""
        idle = asyncio.create_task(self._streams.wait_idle())
        try:
            await asyncio.wait({idle, pump}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            idle.cancel()

    async def _pump(self) -> None:
        async for message in self._link.messages():
            self._watch.heard()
            if isinstance(message, OutputFrame):
                self._kv_bench.deliver(message.finished)
                self._streams.deliver(message)
            elif isinstance(message, EngineStats):
                self._stats = message
                self._streams.broadcast(self._load_report())
        raise EngineError("the engine closed its pipe")

    async def _hang_up(self) -> None:
        """The engine is silent: close the proxies' sockets, so that their requests go elsewhere."""
        self._kv_bench.fail_all(WorkerLost(f"the engine of {self.worker_id} does not answer"))
        await self._streams.close()

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        self._check_engine()
        return await self._streams.handle(request)

    def _app(self) -> web.Application:
        metrics = metrics_handler(registry(self._get_stats, self._count_sockets))
        bench = Operation(
            "POST", "/v1/bench/kv", "Measure KV transfers with another worker", {JSON: KvBenchReply}, KvBenchRequest
        )
        app = web.Application(middlewares=[errors_as_json])
        add_routes(
            app,
            "pdserve worker",
            [
                (Operation("GET", "/v1/stream", "The WebSocket of a proxy", status=101), self._stream),
                (bench, self._kv_bench.handle),
                (Operation("GET", "/health", "Whether it takes requests", {JSON: WorkerHealth}), self._health),
                (Operation("GET", "/metrics", "For Prometheus", {TEXT: None}), metrics),
            ],
        )
        return app

    async def _health(self, _: web.Request) -> web.Response:
        self._admit()
        health = WorkerHealth(
            status=self._state, worker_id=self.worker_id, pid=os.getpid(), instance=instance(), load=self._load()
        )
        return json_response(health)

    def _get_stats(self) -> EngineStats:
        return self._stats

    def _count_sockets(self) -> int:
        return self._streams.open_sockets

    def _identity(self) -> tuple[str, str]:
        return self.worker_id, self._incarnation

    def _admit(self) -> None:
        if self._state == "starting":
            raise NotReady(f"{self.worker_id} is starting")
        if self._state == "draining":
            raise Draining(f"{self.worker_id} is draining")
        self._check_engine()
        if self._stats.kv_hindrance:
            raise NotReady(f"{self.worker_id} can reach no other worker: {self._stats.kv_hindrance}")

    def _check_engine(self) -> None:
        if self._watch.is_silent:
            raise NotReady(f"the engine of {self.worker_id} does not answer")

    def _load_report(self) -> LoadReport:
        stats = self._stats
        return LoadReport(
            state="starting" if self._state == "ready" and stats.kv_hindrance else self._state,
            running=stats.running,
            waiting=stats.waiting,
            awaiting_kv=stats.awaiting_kv,
            blocks=stats.blocks,
        )

    def _load(self) -> WorkerLoad | None:
        if self._watch.is_silent:
            return None
        blocks = self._stats.blocks
        return WorkerLoad(
            running=self._stats.running,
            waiting=self._stats.waiting + self._stats.awaiting_kv,
            blocks_available=blocks.available,
            blocks_total=blocks.total,
        )

    def _make_info(self, incarnation: str) -> WorkerInfo:
        assert self._ready is not None
        self._incarnation = incarnation
        kv = self._ready.kv
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=incarnation,
            role=self._role,
            url=http_url(self._host, self._listener.getsockname()[1]),
            model=self._pool.model,
            max_seq_len=self._ready.limits.max_seq_len,
            tokens_per_block=self._ready.limits.tokens_per_block,
            kv=KvEndpoint.of(kv) if kv else None,
            pid=os.getpid(),
            device=self._ready.device,
            dtype=self._ready.dtype,
            model_fingerprint=self._ready.model_fingerprint,
            started_at=self._started_at,
        )


async def first(work: Awaitable[EngineReady], stopped: asyncio.Task[bool]) -> EngineReady | None:
    """The result of `work`, or None if `stopped` comes first."""
    task = asyncio.ensure_future(work)
    await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        return task.result()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return None


def worker_id(role: Role, index: int, hostname: str) -> str:
    """The name of worker `index` of its pool; workers of other hosts carry their host's name."""
    if hostname == "localhost":
        return f"{role}-{index}"
    host = socket.getfqdn() if is_every_address(hostname) else bare(hostname)
    return f"{role}-{index}.{re.sub('[^A-Za-z0-9._-]', '_', host)}"

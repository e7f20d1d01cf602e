"""The proxy's process.

Life cycle: the port is bound, the model's tokenizer loaded, then requests are served while the fleet follows the
manager. SIGTERM turns /health to 503 and refuses new requests; the open ones get `drain_timeout_sec` to finish, or
until a second signal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Middleware

from pdserve.addresses import host_port, http_url
from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.draining import Stop
from pdserve.errors import Aborted
from pdserve.http import Handler, bind, errors_as_json, start
from pdserve.openapi import add_routes
from pdserve.process import freeze_startup_objects
from pdserve.protocol import Role
from proxy.cors import Cors
from proxy.endpoints import ENDPOINTS
from proxy.fleet.fleet import Fleet
from proxy.metrics import Metrics
from proxy.model_loading import load_model
from proxy.routes.endpoint import Endpoint
from proxy.routes.operations import Operations
from proxy.routes.request_ids import HEADER, request_id_of
from proxy.routes.tokens import Tokens
from proxy.routes.unserved import refuse_unserved
from proxy.service import Service

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.001
"""How long a thread that works on a large text may keep the event loop from the interpreter."""


async def run(config: ClusterConfig) -> None:
    """Serve until SIGTERM, SIGINT, SIGHUP or cancellation.

    Raises:
        ListenError: the address is taken.
        ConfigError: the model or its tokenizer can't be read.
    """
    listener = bind(config.hostname, config.port)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with contextlib.closing(listener):
        model = await asyncio.to_thread(load_model, config)
        stop = Stop()
        with stop.on_signals():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                sender = f"proxy-{socket.gethostname()}-{os.getpid()}"
                fleet = Fleet(config, session, sender, model.fingerprint)
                service = Service(config, model, fleet, Metrics())
                await _serve(service, listener, stop)


async def _serve(service: Service, listener: socket.socket, stop: Stop) -> None:
    config = service.config
    async with ClusterClient(http_url(config.manager.hostname, config.manager.port)) as manager:
        membership = asyncio.create_task(service.fleet.members.follow(manager.watch()), name="membership")
        http = await start(make_app(service), listener)
        freeze_startup_objects()
        address = host_port(*listener.getsockname()[:2])
        log.info("serving %s at http://%s", service.model.name, address)
        try:
            stopped = asyncio.create_task(stop.asked.wait())
            await asyncio.wait({membership, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if membership.done():
                membership.result()
            log.info("shutting down")
            await service.drain(stop)
        finally:
            service.close()
            await http.cleanup()
            membership.cancel()
            await asyncio.gather(membership, return_exceptions=True)
            await service.fleet.members.close()


def make_app(service: Service, endpoints: Sequence[Endpoint[Any]] = ENDPOINTS) -> web.Application:
    """All routes over `service`."""
    observe = _observer(service.metrics)
    cors = Cors(service.config.proxy.cors_allow_origins)
    app = web.Application(
        middlewares=[observe, cors.preflight, errors_as_json], client_max_size=service.config.proxy.max_body_bytes
    )
    app.on_response_prepare.append(_name_request)
    app.on_response_prepare.append(cors.allow)
    generating = [(endpoint.operation, endpoint.handler(service)) for endpoint in endpoints]
    add_routes(app, "pdserve", [*generating, *Tokens(service).routes(), *Operations(service).routes()])
    refuse_unserved(app)
    for role in ("context", "generation"):
        _watch_connections(service, role)
    service.metrics.watch_other_models(lambda: service.fleet.members.num_of_other_models)
    return app


def _watch_connections(service: Service, role: Role) -> None:
    service.metrics.watch_connections(role, lambda: len(service.fleet.members.placeable(role)))


def _observer(metrics: Metrics) -> Middleware:
    """Counts answers by route and status."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        status = Aborted.status  # unless an answer comes, the client is gone
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            resource = request.match_info.route.resource
            metrics.requests.labels("unknown" if resource is None else resource.canonical, status).inc()

    return observe


async def _name_request(request: web.Request, response: web.StreamResponse) -> None:
    response.headers[HEADER] = request_id_of(request)

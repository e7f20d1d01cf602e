"""What operators and load balancers ask: models, health, readiness, version, metrics."""

from __future__ import annotations

import os
from typing import Literal

import msgspec
from aiohttp import web

from pdserve.errors import Draining, ModelNotFound, NotReady, Overloaded
from pdserve.http import Handler, json_response, metrics_handler
from pdserve.openapi import JSON, TEXT, Operation
from pdserve.process import instance
from pdserve.protocol import Role
from pdserve.version import __version__
from proxy.service import Service


class ModelCard(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[ModelCard]


class Version(msgspec.Struct):
    version: str


class Alive(msgspec.Struct):
    """`instance` is new with each start of the process."""

    status: Literal["alive"]
    pid: int
    instance: str


class WorkerCount(msgspec.Struct):
    ready: int
    required: int


class Health(msgspec.Struct):
    """The answer with 503 has the same fields, and an error's."""

    status: Literal["ready", "not ready"]
    pid: int
    instance: str
    workers: dict[Role, WorkerCount]


class Ready(msgspec.Struct):
    status: Literal["ready"]


class Operations:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._metrics = metrics_handler(service.metrics.registry)

    def routes(self) -> list[tuple[Operation, Handler]]:
        """What is served, and how."""
        named, live = "/v1/models/{model:.+}", {JSON: Alive}
        enough, now = "Whether the workers are there that the configuration asks for", "Whether it takes requests now"
        health = Operation("GET", "/health", enough, {JSON: Health}, errors=(NotReady,))
        ready = Operation("GET", "/ready", now, {JSON: Ready}, errors=(NotReady, Draining))
        model = Operation("GET", named, "One model", {JSON: ModelCard}, errors=(ModelNotFound,))
        return [
            (Operation("GET", "/v1/models", "The model that is served", {JSON: ModelList}), self.models),
            (model, self.model),
            (health, self.health),
            (ready, self.ready),
            (Operation("GET", "/health/live", "Whether the process lives", live), self.live),
            (Operation("GET", "/version", "The server's version", {JSON: Version}), self.version),
            (Operation("GET", "/metrics", "For Prometheus", {TEXT: None}), self._metrics),
        ]

    async def models(self, _: web.Request) -> web.Response:
        return json_response(ModelList("list", [self._card()]))

    async def model(self, request: web.Request) -> web.Response:
        self._service.model.check_name(request.match_info["model"])
        return json_response(self._card())

    async def version(self, _: web.Request) -> web.Response:
        return json_response(Version(__version__))

    async def live(self, _: web.Request) -> web.Response:
        return json_response(Alive("alive", os.getpid(), instance()))

    async def health(self, request: web.Request) -> web.Response:
        """200 if as many workers are there as `minimal_instances` says, and this proxy is not going away; else 503 with
        what is missing. Load has no part in it. `?live` only asks for the process."""
        if "live" in request.query:
            return await self.live(request)
        counts = {role: WorkerCount(ready, required) for role, ready, required in self._roles()}
        missing = self._missing()
        found = Health("not ready" if missing else "ready", os.getpid(), instance(), counts)
        if not missing:
            return json_response(found)
        error = NotReady("; ".join(missing))
        headers = {"Retry-After": str(error.retry_after_s)}
        body = {**msgspec.structs.asdict(found), **error.to_openai()}
        return json_response(body, status=error.status, headers=headers)

    async def ready(self, _: web.Request) -> web.Response:
        """200 if a request that came now would be taken up, by however few workers.

        Raises:
            NotReady: it would not: there is no place, no worker, or this proxy is going away.
        """
        try:
            self._service.admission.check()
        except Overloaded as error:
            raise NotReady(error.message) from None
        self._service.fleet.max_seq_len()
        return json_response(Ready("ready"))

    def _card(self) -> ModelCard:
        model = self._service.model
        return ModelCard(model.name, "model", model.created, "pdserve")

    def _missing(self) -> list[str]:
        missing = [
            f"{ready} of {required} {role} workers are connected and ready"
            for role, ready, required in self._roles()
            if ready < required
        ]
        return ["shutting down", *missing] if self._service.draining else missing

    def _roles(self) -> list[tuple[Role, int, int]]:
        """Each role with the number of its ready workers and the number required."""
        service = self._service
        minimal = service.config.disagg_cluster.minimal_instances
        # Without context workers in the configuration, generation workers do both phases.
        required: dict[Role, int] = {
            "context": minimal.context_servers if service.fleet.disaggregated else 0,
            "generation": minimal.generation_servers,
        }
        return [(role, len(service.fleet.members.placeable(role)), count) for role, count in required.items()]

"""What operators and load balancers ask: models, health, version, metrics. One row for each route."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from pdserve.errors import ModelNotFound, NotReady, OpenAiError, PdserveError
from pdserve.http import Handler, json_response, metrics_handler
from pdserve.process import instance
from pdserve.protocol import Role
from pdserve.version import __version__
from proxy.service import Service


@dataclass(frozen=True, slots=True)
class Operation:
    """One route, a GET. `reply` is what it answers, None for plain text; `errors` are those it raises, and `not_ready`
    is answered with 503 instead."""

    path: str
    summary: str
    handler: Handler
    reply: type[msgspec.Struct] | None
    errors: tuple[type[PdserveError], ...] = ()
    not_ready: type[msgspec.Struct] | None = None


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
    """`error` says what is missing while the server is not ready."""

    status: Literal["ready", "not ready"]
    pid: int
    instance: str
    workers: dict[Role, WorkerCount]
    error: OpenAiError | UnsetType = UNSET


class Operations:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def rows(self) -> list[Operation]:
        """All routes."""
        metrics = metrics_handler(self._service.metrics.registry)
        return [
            Operation("/v1/models", "List the model that is served", self.models, ModelList),
            Operation("/v1/models/{model:.+}", "Describe a model", self.model, ModelCard, (ModelNotFound,)),
            Operation("/health", "Whether requests can be served", self.health, Health, not_ready=Health),
            Operation("/health/live", "Whether the process lives", self.live, Alive),
            Operation("/version", "The server's version", self.version, Version),
            Operation("/metrics", "Metrics in Prometheus' text format", metrics, None),
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
        """200 if requests can be served, else 503 with what is missing; `?live` only asks for the process."""
        if "live" in request.query:
            return await self.live(request)
        counts = {role: WorkerCount(ready, required) for role, ready, required in self._roles()}
        missing = self._missing()
        if not missing:
            return json_response(Health("ready", os.getpid(), instance(), counts))
        error = NotReady("; ".join(missing))
        said = error.to_openai()["error"]
        headers = {"Retry-After": str(error.retry_after_s)}
        return json_response(
            Health("not ready", os.getpid(), instance(), counts, said), status=error.status, headers=headers
        )

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

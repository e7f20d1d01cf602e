"""What operators and load balancers ask: models, health, version."""

from __future__ import annotations

import os

from aiohttp import web

from pdserve.errors import NotReady
from pdserve.http import json_response
from pdserve.process import instance
from pdserve.protocol import Role
from pdserve.version import __version__
from proxy.service import Service


class Operations:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def models(self, _: web.Request) -> web.Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        self._service.model.check_name(request.match_info["model"])
        return json_response(self._card())

    async def version(self, _: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def live(self, _: web.Request) -> web.Response:
        return json_response({"status": "alive", "pid": os.getpid(), "instance": instance()})

    async def health(self, request: web.Request) -> web.Response:
        """200 if requests can be served, else 503 with what is missing; `?live` only asks for the process."""
        if "live" in request.query:
            return await self.live(request)
        missing = self._missing()
        body = {
            "status": "not ready" if missing else "ready",
            "pid": os.getpid(),
            "instance": instance(),
            "workers": self._counts(),
        }
        if not missing:
            return json_response(body)
        error = NotReady("; ".join(missing))
        headers = {"Retry-After": str(error.retry_after_s)}
        return json_response({**body, **error.to_openai()}, status=error.status, headers=headers)

    def _card(self) -> dict[str, object]:
        model = self._service.model
        return {"id": model.name, "object": "model", "created": model.created, "owned_by": "pdserve"}

    def _counts(self) -> dict[str, dict[str, int]]:
        return {role: {"ready": ready, "required": required} for role, ready, required in self._roles()}

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

"""OpenAPI documents: valid by the specification, and true of what is served."""

from __future__ import annotations

from typing import Any

import aiohttp
from aiohttp import web
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import BaseModel, Field

from pdserve.addresses import http_url
from pdserve.config import load
from pdserve.errors import RequestError
from pdserve.http import bind, start
from pdserve.openapi import JSON, TEXT, ErrorAnswer, Operation, document
from pdserve.worker.server import WorkerServer
from tests.manager import TestManager


class Part(BaseModel):
    weight_g: float


class Thing(BaseModel):
    """A thing."""

    name: str = Field(max_length=3)
    parts: list[Part] = []


class Which(BaseModel):
    colour: str
    limit: int | None = Field(default=None, ge=1)


OPERATIONS = [
    Operation("POST", "/things", "Make a thing", {JSON: Thing}, body=Thing),
    Operation("GET", "/things/{kind}/{name:.+}", "Things", {JSON: Thing, "text/event-stream": None}, query=Which),
    Operation("DELETE", "/things/{kind}/{name:.+}", "Remove a thing", status=204),
    Operation("GET", "/metrics", "Metrics", {TEXT: None}),
]


def test_a_document_is_made_of_the_schemas() -> None:
    made = document("things", OPERATIONS)
    OpenAPIV31SpecValidator(made).validate()
    assert set(made["paths"]) == {"/things", "/things/{kind}/{name}", "/metrics"}
    assert set(made["paths"]["/things/{kind}/{name}"]) == {"get", "delete"}
    post, get = made["paths"]["/things"]["post"], made["paths"]["/things/{kind}/{name}"]["get"]
    thing = {"$ref": "#/components/schemas/Thing"}
    assert post["requestBody"] == {"required": True, "content": {JSON: {"schema": thing}}}
    assert post["responses"]["200"]["content"][JSON]["schema"] == thing
    assert made["components"]["schemas"]["Thing"]["properties"]["name"]["maxLength"] == 3
    assert [(each["name"], each["in"], each["required"]) for each in get["parameters"]] == [
        *(("kind", "path", True), ("name", "path", True)),
        *(("colour", "query", True), ("limit", "query", False)),
    ]
    assert set(get["responses"]["200"]["content"]) == {JSON, "text/event-stream"}
    removed = made["paths"]["/things/{kind}/{name}"]["delete"]["responses"]
    assert "content" not in removed["204"]
    assert removed["default"]["content"][JSON]["schema"] == {"$ref": "#/components/schemas/ErrorAnswer"}


def test_errors_are_as_they_are_described() -> None:
    answer = RequestError("no", "field").to_openai()
    assert ErrorAnswer.model_validate(answer).model_dump() == answer


async def served(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/openapi.json") as response:
        assert (response.status, response.content_type) == (200, JSON)
        return dict(await response.json())


def routes(app: web.Application) -> set[tuple[str, str]]:
    """What the application serves but for the description itself, and the page of it."""
    found = {
        (route.method.lower(), route.resource.canonical)
        for route in app.router.routes()
        if route.method != "HEAD" and route.resource is not None
    }
    own = {("get", "/openapi.json"), ("get", "/docs")}
    assert found >= own
    return found - own


def described(made: dict[str, Any]) -> set[tuple[str, str]]:
    return {(method, path) for path, methods in made["paths"].items() for method in methods}


async def test_the_manager_describes_what_it_serves() -> None:
    async with TestManager() as manager:
        made = await served(manager.url)
        assert described(made) == routes(manager.app)
    OpenAPIV31SpecValidator(made).validate()
    register = made["paths"]["/v1/workers"]["post"]
    assert register["requestBody"]["content"][JSON]["schema"] == {"$ref": "#/components/schemas/RegisterRequest"}
    assert "url" in made["components"]["schemas"]["WorkerInfo"]["required"]
    assert made["paths"]["/v1/workers/{worker_id}"]["delete"]["parameters"][1]["name"] == "lease_id"


async def test_a_worker_describes_what_it_serves() -> None:
    config = load([], ["--model=any", "--context_servers.hostname=127.0.0.1"])
    worker = WorkerServer(config, config.context_servers, "context", 0, "no.engine")
    app = worker._app()
    listener = bind("127.0.0.1", 0)
    runner = await start(app, listener)
    try:
        made = await served(http_url("127.0.0.1", listener.getsockname()[1]))
    finally:
        await runner.cleanup()
        await worker._link.stop()
        worker._listener.close()
    assert described(made) == routes(app)
    OpenAPIV31SpecValidator(made).validate()
    assert made["paths"]["/v1/bench/kv"]["post"]["requestBody"]["required"]
    assert made["paths"]["/health"]["get"]["responses"]["200"]["content"][JSON]["schema"] == {
        "$ref": "#/components/schemas/WorkerHealth"
    }

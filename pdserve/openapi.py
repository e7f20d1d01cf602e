"""`GET /openapi.json` of every HTTP server: OpenAPI 3.1, made from the schemas of what it serves.

A server lists its operations once, each with its handler: `add_routes` routes them and serves their description. So the
two can't differ. A server that routes by itself makes its description with `document`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pdserve.http import Handler
from pdserve.version import __version__

JSON, TEXT = "application/json", "text/plain"
Schema = type[BaseModel]

_VARIABLE = re.compile(r"{(\w+)(?::[^{}]+)?}")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str


class ErrorAnswer(BaseModel):
    """What every operation answers with when it fails, as `PdserveError.to_openai` makes it."""

    error: ErrorDetail


class Operation(NamedTuple):
    """One method of one path.

    Args:
        path: as aiohttp takes it. `{name}` and `{name:pattern}` are text.
        summary: what the operation does, for people.
        answers: the schema of each media type in which it may answer; None for text. Empty: it answers no content.
        body: the schema of the JSON that it takes.
        query: the schema whose fields are its query parameters.
        status: of an answer that is no error.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[str, Schema | None] = {}
    body: Schema | None = None
    query: Schema | None = None
    status: int = 200


def add_routes(app: web.Application, title: str, routes: Iterable[tuple[Operation, Handler]]) -> None:
    """Route each operation to its handler, and `GET /openapi.json` to the description of all of them."""
    table = list(routes)

    @functools.cache
    def description() -> bytes:
        return msgspec.json.encode(document(title, [operation for operation, _ in table]))

    async def describe(_: web.Request) -> web.Response:
        return web.Response(body=description(), content_type=JSON)

    app.add_routes([web.route(operation.method, operation.path, handler) for operation, handler in table])
    app.router.add_get("/openapi.json", describe)


def document(title: str, operations: Iterable[Operation]) -> dict[str, Any]:
    """The OpenAPI document of `operations`, as plain data."""
    table = list(operations)
    used: list[tuple[Schema, Literal["validation", "serialization"]]] = [(ErrorAnswer, "serialization")]
    for operation in table:
        used += [(answer, "serialization") for answer in operation.answers.values() if answer is not None]
        used += [(operation.body, "validation")] if operation.body is not None else []
    references, schemas = models_json_schema(list(dict.fromkeys(used)), ref_template="#/components/schemas/{model}")
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        path = paths.setdefault(_VARIABLE.sub(r"{\1}", operation.path), {})
        path[operation.method.lower()] = _described(operation, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _described(operation: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    def content(media_types: Mapping[str, Schema | None], mode: str) -> dict[str, Any]:
        return {
            media_type: {"schema": {"type": "string"} if schema is None else references[schema, mode]}
            for media_type, schema in media_types.items()
        }

    answer: dict[str, Any] = {"description": operation.summary}
    if operation.answers:
        answer["content"] = content(operation.answers, "serialization")
    error = {"description": "An error", "content": content({JSON: ErrorAnswer}, "serialization")}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {str(operation.status): answer, "default": error},
    }
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": content({JSON: operation.body}, "validation")}
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _VARIABLE.findall(operation.path)
    ]
    if operation.query is not None:
        schema = operation.query.model_json_schema()
        required = schema.get("required", ())
        parameters += [
            {"name": name, "in": "query", "required": name in required, "schema": each}
            for name, each in schema["properties"].items()
        ]
    return parameters

"""`GET /openapi.json` of every HTTP server: OpenAPI 3.1, made from the schemas of what it serves. `GET /docs` is a page
that shows it, from one file and without a network.

A server lists its operations once, each with its handler: `add_routes` routes them and serves their description. So the
two can't differ. A server that routes by itself makes its description with `document`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from pdserve.errors import PdserveError
from pdserve.http import Handler
from pdserve.version import __version__

JSON, TEXT, EVENTS = "application/json", "text/plain", "text/event-stream"
Schema = type[BaseModel]
Shape = type[BaseModel] | type[msgspec.Struct]
Mode = Literal["validation", "serialization"]

_REFERENCE = "#/components/schemas/"
_PAGE = Path(__file__).with_name("api_page.html")
_PAGE_HEADERS = {
    # All that the page is made of stands in it; all that it asks for is the description.
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
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
        answers: the shape of each media type in which it may answer; None for text. Empty: it answers no content. Of a
            stream of events it is the shape of each one's data.
        body: the schema of the JSON that it takes.
        query: the schema whose fields are its query parameters.
        status: of an answer that is no error.
        errors: those to describe by their status and code. Any other may be answered, too.
    """

    method: str
    path: str
    summary: str
    answers: Mapping[str, Shape | None] = {}
    body: Schema | None = None
    query: Schema | None = None
    status: int = 200
    errors: Sequence[type[PdserveError]] = ()


def add_routes(app: web.Application, title: str, routes: Iterable[tuple[Operation, Handler]]) -> None:
    """Route each operation to its handler, and `GET /openapi.json` and `GET /docs`, which describe them all."""
    table = list(routes)
    page = _PAGE.read_bytes()

    @functools.cache
    def description() -> bytes:
        return msgspec.json.encode(document(title, [operation for operation, _ in table]))

    async def describe(_: web.Request) -> web.Response:
        # The first takes tens of milliseconds.
        return web.Response(body=await asyncio.to_thread(description), content_type=JSON)

    async def show(_: web.Request) -> web.Response:
        return web.Response(body=page, headers=_PAGE_HEADERS, content_type="text/html", charset="utf-8")

    app.add_routes([web.route(operation.method, operation.path, handler) for operation, handler in table])
    app.router.add_get("/openapi.json", describe)
    app.router.add_get("/docs", show)


def document(title: str, operations: Iterable[Operation]) -> dict[str, Any]:
    """The OpenAPI document of `operations`, as plain data."""
    table = list(operations)
    references, schemas = _shapes(table)
    paths: dict[str, dict[str, Any]] = {}
    for operation in table:
        path = paths.setdefault(_VARIABLE.sub(r"{\1}", operation.path), {})
        path[operation.method.lower()] = _described(operation, references)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _shapes(table: Sequence[Operation]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """References by shape and mode, and the shapes by name. Two shapes of one name are a mistake of ours."""
    answers = [shape for operation in table for shape in operation.answers.values() if shape is not None]
    models: list[tuple[Schema, Mode]] = [(ErrorAnswer, "serialization")]
    models += [(shape, "serialization") for shape in answers if issubclass(shape, BaseModel)]
    models += [(operation.body, "validation") for operation in table if operation.body is not None]
    references, described = models_json_schema(list(dict.fromkeys(models)), ref_template=_REFERENCE + "{model}")
    structs = [shape for shape in answers if issubclass(shape, msgspec.Struct)]
    found, sent = msgspec.json.schema_components(structs, ref_template=_REFERENCE + "{name}")
    for schema in sent.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    schemas = described["$defs"]
    assert not schemas.keys() & sent.keys(), "two shapes have one name"
    of_structs: dict[Any, Any] = {
        (struct, "serialization"): reference for struct, reference in zip(structs, found, strict=True)
    }
    return {**references, **of_structs}, {**schemas, **sent}


def _described(operation: Operation, references: Mapping[Any, Any]) -> dict[str, Any]:
    def content(media_types: Mapping[str, Shape | None], mode: str) -> dict[str, Any]:
        return {
            media_type: {"schema": {"type": "string"} if schema is None else references[schema, mode]}
            for media_type, schema in media_types.items()
        }

    answer: dict[str, Any] = {"description": operation.summary}
    if operation.answers:
        answer["content"] = content(operation.answers, "serialization")
    error = content({JSON: ErrorAnswer}, "serialization")
    responses = {str(operation.status): answer, **_errors(operation.errors, error)}
    responses["default"] = {"description": "An error", "content": error}
    described: dict[str, Any] = {"summary": operation.summary, "responses": responses}
    if parameters := _parameters(operation):
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": content({JSON: operation.body}, "validation")}
    return described


def _errors(errors: Sequence[type[PdserveError]], content: dict[str, Any]) -> dict[str, Any]:
    """One answer for each status; its description names the codes."""
    answers: dict[str, Any] = {}
    for status in sorted({error.status for error in errors}):
        own = [error for error in errors if error.status == status]
        answer = answers[str(status)] = {"description": ", ".join(error.code for error in own), "content": content}
        if any(error.retry_after_s is not None for error in own):
            answer["headers"] = {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}}
    return answers


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

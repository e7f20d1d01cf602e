"""The API's description as OpenAPI 3.1, made of the rows that serve it: `GET /openapi.json`.

Bodies are described by the pydantic models that parse them, answers and events by the msgspec structs that are sent,
errors by the classes that are raised. Nothing of a schema is written here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from pydantic.json_schema import models_json_schema

from pdserve.errors import (
    BodyTooLarge,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineError,
    ErrorAnswer,
    LimitExceeded,
    ModelNotFound,
    NotReady,
    Overloaded,
    PdserveError,
    RequestError,
    RequestTimeout,
    TransferError,
    UnsupportedMediaType,
    WorkerLost,
)
from pdserve.version import __version__
from proxy.routes.endpoint import Endpoint
from proxy.routes.operations import Operation

Json = dict[str, Any]

GENERATION_ERRORS: tuple[type[PdserveError], ...] = (
    RequestError,
    LimitExceeded,
    ContextLengthExceeded,
    ModelNotFound,
    RequestTimeout,
    BodyTooLarge,
    UnsupportedMediaType,
    Overloaded,
    PdserveError,
    EngineError,
    WorkerLost,
    TransferError,
    NotReady,
    Draining,
    DeadlineExceeded,
)
"""What an endpoint that generates may answer instead. In a stream that has begun, the same is its last event."""

_REFERENCE = "#/components/schemas/"
_PATH_PARAMETER = re.compile(r"\{(\w+)(:[^}]*)?\}")


def document(endpoints: Sequence[Endpoint[Any]], operations: Sequence[Operation]) -> Json:
    """The description of these rows as plain data."""
    paths = {_plain(endpoint.path): {"post": _endpoint(endpoint)} for endpoint in endpoints}
    paths |= {_plain(operation.path): {"get": _operation(operation)} for operation in operations}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pdserve", "version": __version__},
        "paths": paths,
        "components": {"schemas": _schemas(endpoints, operations)},
    }


def _endpoint(endpoint: Endpoint[Any]) -> Json:
    whole, events = _content("application/json", endpoint.reply), _content("text/event-stream", endpoint.event)
    return {
        "summary": endpoint.summary,
        "operationId": endpoint.schema.__name__,
        "requestBody": {"required": True, "content": _content("application/json", endpoint.schema)},
        "responses": {
            "200": {
                "description": "The answer; with `stream`, server-sent events, whose data are as described.",
                "content": whole | events,
            },
            **_errors(GENERATION_ERRORS),
        },
    }


def _operation(operation: Operation) -> Json:
    parameters = [
        {"name": found[1], "in": "path", "required": True, "schema": {"type": "string"}}
        for found in _PATH_PARAMETER.finditer(operation.path)
    ]
    content = (
        {"text/plain": {"schema": {"type": "string"}}}
        if operation.reply is None
        else _content("application/json", operation.reply)
    )
    responses = {"200": {"description": operation.summary, "content": content}, **_errors(operation.errors)}
    if operation.not_ready is not None:
        responses |= _errors((NotReady,))
        responses[str(NotReady.status)]["content"] = _content("application/json", operation.not_ready)
    return {"summary": operation.summary, **({"parameters": parameters} if parameters else {}), "responses": responses}


def _errors(errors: Iterable[type[PdserveError]]) -> Json:
    """One response for each status; its description names the codes."""
    codes: dict[int, list[type[PdserveError]]] = {}
    for error in errors:
        codes.setdefault(error.status, []).append(error)
    return {str(status): _error(classes) for status, classes in sorted(codes.items())}


def _error(classes: Sequence[type[PdserveError]]) -> Json:
    response: Json = {
        "description": "Error " + ", ".join(dict.fromkeys(error.code for error in classes)),
        "content": _content("application/json", ErrorAnswer),
    }
    if any(error.retry_after_s is not None for error in classes):
        response["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return response


def _content(media_type: str, shape: type) -> Json:
    return {media_type: {"schema": {"$ref": _REFERENCE + shape.__name__}}}


def _schemas(endpoints: Sequence[Endpoint[Any]], operations: Sequence[Operation]) -> Json:
    """All shapes by name. Two shapes of one name are a mistake of ours."""
    bodies = [(endpoint.schema, "validation") for endpoint in endpoints]
    _, described = models_json_schema(bodies, ref_template=_REFERENCE + "{model}")  # type: ignore[arg-type]
    answers = [shape for endpoint in endpoints for shape in (endpoint.reply, endpoint.event)]
    answers += [operation.reply for operation in operations if operation.reply is not None]
    _, sent = msgspec.json.schema_components([*answers, ErrorAnswer], ref_template=_REFERENCE + "{name}")
    schemas: Json = described["$defs"]
    assert not schemas.keys() & sent.keys(), "two shapes have one name"
    schemas |= sent
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    return schemas


def _plain(path: str) -> str:
    """aiohttp's path without the patterns of its parameters."""
    return _PATH_PARAMETER.sub(r"{\1}", path)

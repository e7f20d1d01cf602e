"""The proxy against its own description: bodies that fit it and bodies that don't, drawn by schemathesis.

Whatever is sent, the status, the media type and the shape of the answer must be ones that `/openapi.json` tells of, and
none may be an internal error. The draws are the same each time.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jsonschema
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from pdserve.openapi import EVENTS
from proxy.endpoints import ENDPOINTS
from tests.fakes.proxy_cluster import proxy_cluster
from tests.unit.test_proxy_openapi import OPERATIONS, TOKENS

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
DRAWS = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
BODIES = [("POST", row.path) for row in (*ENDPOINTS, *TOKENS)]
OTHERS = [(row.method, row.path.replace(":.+", "")) for row in OPERATIONS]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A proxy in a thread of its own, as schemathesis calls it from this one."""
    started: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        async with proxy_cluster() as cluster:
            for worker in cluster.workers:
                worker.behaviour.script = [70, 71, 2]
            stop = asyncio.Event()
            started.set_result((cluster.url, asyncio.get_running_loop(), stop))
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    address, loop, stop = started.result(timeout=60)
    yield address
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture(scope="module")
def api(url: str) -> Any:
    description = requests.get(f"{url}/openapi.json", timeout=30).json()
    found = [(method.upper(), path) for path, methods in description["paths"].items() for method in methods]
    assert sorted(found) == sorted(BODIES + OTHERS)
    return schemathesis.openapi.from_dict(description)


def call_all(url: str, operation: Any, mode: GenerationMode) -> list[int]:
    """The statuses of the calls, each of which passes all checks."""
    statuses = []
    with requests.Session() as session:

        @DRAWS
        @given(case=operation.as_strategy(mode))
        def call(case: Any) -> None:
            if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
                case.body = tame(case.body)
            response = case.call(base_url=url, session=session, timeout=30)
            streamed = response.headers["content-type"][0].startswith(EVENTS)
            # The description gives the shape of each event's data, for which schemathesis has no check.
            checks = [check for check in CHECKS if not streamed or check is not response_schema_conformance]
            case.validate_response(response, checks=checks)
            if streamed:
                check_events(operation, response.text)
            statuses.append(response.status_code)

        call()
    return statuses


def check_events(operation: Any, stream: str) -> None:
    description = operation.schema.raw_schema
    content = description["paths"][operation.path]["post"]["responses"]["200"]["content"]
    schema = {**content[EVENTS]["schema"], "components": description["components"]}
    *events, done = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    for event in events:
        jsonschema.Draft202012Validator(schema).validate(json.loads(event))


def tame(body: dict[str, Any]) -> dict[str, Any]:
    """`body` asking for little, and for what is there, beyond what JSON Schema can say; so more of it is served."""
    limits = {"max_tokens": 5, "max_completion_tokens": 5, "min_tokens": 1, "n": 2, "best_of": None}
    fitting = {**body, "model": "fake", **{name: limit for name, limit in limits.items() if name in body}}
    if body.get("messages") is not None:
        fitting["messages"] = [fit(message) for message in body["messages"]] or [{"role": "user", "content": "hi"}]
    return whole(fitting)


def fit(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with what its role has, and nothing that only others have."""
    others = {"assistant": {"tool_call_id"}, "tool": {"tool_calls", "reasoning_content"}}
    left_out = others.get(message["role"], {"tool_call_id", "tool_calls", "reasoning_content"})
    fitting = {name: value for name, value in message.items() if name not in left_out}
    if message["role"] == "tool":
        fitting["tool_call_id"] = "call"
    for call in fitting.get("tool_calls") or []:
        call["function"]["arguments"] = "{}"
    return {**fitting, "content": "hi" if message.get("content") is None else message["content"]}


def whole(value: Any) -> Any:
    """`value` with integers where it has 1.0, which JSON Schema calls an integer as well and the proxy does not, and
    with token ids in its lists that are in the vocabulary."""
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [whole(each) % 300 if isinstance(whole(each), int) else whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


@pytest.mark.parametrize(("method", "path"), BODIES + OTHERS)
def test_what_fits_the_description_is_answered_as_it_says(url: str, api: Any, method: str, path: str) -> None:
    statuses = call_all(url, api[path][method], GenerationMode.POSITIVE)
    assert (404 if "{model}" in path else 200) in statuses


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_what_does_not_fit_is_refused(url: str, api: Any, method: str, path: str) -> None:
    statuses = call_all(url, api[path][method], GenerationMode.NEGATIVE)
    assert all(400 <= status < 500 for status in statuses)

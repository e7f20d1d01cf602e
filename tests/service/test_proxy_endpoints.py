"""An endpoint is a row: one that the package does not know is served by the same machinery as its own.

The row here takes a question and answers in a form of its own, with named events and without OpenAI's `[DONE]`.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import jsonschema
import msgspec
import pytest
from pydantic import Field

import proxy.routes.answer
import proxy.routes.event_stream
from pdserve.errors import LimitExceeded, PdserveError, RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import Finished, OutputFrame, Sampling
from proxy.choice import Choice, Piece
from proxy.endpoints import ENDPOINTS
from proxy.model import ServedModel
from proxy.plan import Conversation, Plan
from proxy.routes.endpoint import Endpoint
from proxy.schemas.request import Request
from proxy.schemas.usage import UsageInfo
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, until
from tests.service.test_proxy_api import USER, say, tokens_of

ASKED = {"question": "hi", "longest": 50}


class Question(Request):
    model: str = "fake"
    question: str = Field(min_length=1)
    longest: int = Field(default=20, ge=1)
    live: bool = False
    until: str | None = None
    as_chat: bool = False


class Said(msgspec.Struct):
    text: str
    why: str | None


class Reply(msgspec.Struct):
    said: Sequence[Said]
    cost: int


class Happening(msgspec.Struct):
    text: str
    number: int


def plan(body: Question, _: ServedModel) -> Plan:
    if body.until == "":
        raise RequestError("until: must not be empty", "until")
    messages = [{"role": "user", "content": body.question}]
    return Plan(
        model=body.model,
        prompts=Conversation(1, lambda: messages) if body.as_chat else [body.question],
        sampling=sampling,
        max_tokens=body.longest,
        stream=body.live,
        stop=() if body.until is None else (body.until,),
        prompt_param="question",
        limit_param="longest",
    )


def sampling(_: GenerationDefaults, seed: int, max_tokens: int) -> Sampling:
    return Sampling(seed=seed, max_tokens=max_tokens, temperature=0.0)


def named(name: str, data: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(data))


class Writer:
    def __init__(self, answer_id: str, model: ServedModel, body: Question) -> None:
        self._answer_id = answer_id
        self._number = 0

    def choice(self, choice: Choice, piece: Piece) -> Said:
        return Said(piece.text, piece.finish_reason)

    def whole(self, choices: Sequence[Any], usage: UsageInfo) -> Reply:
        return Reply(choices, usage.total_tokens)

    def news(self, choice: Choice, piece: Piece) -> bytes:
        begin = named("begin", {"id": self._answer_id}) if self._number == 0 else b""
        self._number += 1
        return begin + named("more", Happening(piece.text, self._number))

    def end(self, usage: UsageInfo) -> bytes:
        return named("end", {"cost": usage.total_tokens})

    def error(self, error: PdserveError) -> bytes:
        return named("failed", {"code": error.code})


ROW = Endpoint(
    path="/v1/questions",
    summary="Answer a question",
    id_prefix="question",
    schema=Question,
    plan=plan,
    formatter=Writer,
    reply=Reply,
    event=Happening,
)


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster(endpoints=[*ENDPOINTS, ROW]) as running:
        yield running


def parsed(stream: str) -> list[tuple[str, Any]]:
    """The events of `stream` by name."""
    blocks = [block for block in stream.split("\n\n") if block and not block.startswith(":")]
    lines = [block.split("\n") for block in blocks]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in lines]


async def asked(cluster: ProxyCluster, **fields: Any) -> list[tuple[str, Any]]:
    async with cluster.session.post("/v1/questions", json={**ASKED, **fields, "live": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        return parsed(await response.text())


async def test_a_row_of_its_own_answers_in_one_piece(cluster: ProxyCluster) -> None:
    script = say(cluster, "one two")
    status, body = await cluster.post("questions", **ASKED)
    cost = len(tokens_of(cluster, "hi")) + len(script)
    assert (status, body) == (200, {"said": [{"text": "one two", "why": "stop"}], "cost": cost})
    (context,), (generation,) = cluster.contexts[0].received, cluster.generations[0].received
    assert context.token_ids == generation.token_ids == tokens_of(cluster, "hi")
    assert context.key.request_id.startswith("question-")
    assert context.sampling.max_tokens == 50
    await cluster.post("questions", **ASKED, as_chat=True)
    rendered = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert cluster.contexts[0].received[1].token_ids == tokens_of(cluster, rendered)


async def test_a_row_of_its_own_streams_token_by_token(cluster: ProxyCluster) -> None:
    script = say(cluster, "one two 🙂", token_delay_s=0.005)
    (begin, first), *more, (end, cost) = await asked(cluster)
    assert (begin, end) == ("begin", "end")
    assert first["id"].startswith("question-")
    assert {name for name, _ in more} == {"more"}
    assert "".join(data["text"] for _, data in more) == "one two 🙂"
    assert [data["number"] for _, data in more] == list(range(1, len(more) + 1))
    assert len(more) >= len(script), "each token came alone"
    assert cost == {"cost": len(tokens_of(cluster, "hi")) + len(script)}
    await cluster.nothing_open()


async def test_stop_strings_and_metrics_are_the_machinerys(cluster: ProxyCluster) -> None:
    say(cluster, "one two three", token_delay_s=0.005)
    _, body = await cluster.post("questions", **ASKED, until=" th")
    assert body["said"] == [{"text": "one two", "why": "stop"}]
    _, *more, _ = await asked(cluster, until=" th")
    assert "".join(data["text"] for _, data in more) == "one two"
    await cluster.nothing_open()
    async with cluster.session.get("/metrics") as response:
        assert 'requests_total{route="/v1/questions",status="200"} 2.0' in await response.text()


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"question": ""}, 400, "invalid_request", "question"),
        ({"colour": 1}, 400, "invalid_request", "colour"),
        ({"until": ""}, 400, "invalid_request", "until"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"longest": 4000}, 400, "context_length_exceeded", "longest"),
        ({"question": "a" * 500_000}, 400, "context_length_exceeded", "question"),
    ],
)
@pytest.mark.parametrize("live", [False, True])
async def test_mistakes_are_refused_by_the_rows_own_names(
    cluster: ProxyCluster, fields: dict[str, Any], status: int, code: str, param: str, live: bool
) -> None:
    found, body = await cluster.post("questions", **{**ASKED, **fields, "live": live})
    assert (found, body["error"]["code"], body["error"]["param"]) == (status, code, param)
    assert not cluster.contexts[0].received


async def test_places_are_taken_before_anything_is_tokenized() -> None:
    async with proxy_cluster(endpoints=[ROW], max_concurrent_requests=1) as cluster:
        cluster.generations[0].behaviour.hang = True
        first = asyncio.create_task(cluster.post("questions", **ASKED))
        await until(lambda: len(cluster.generations[0].received) == 1)
        status, body = await cluster.post("questions", **ASKED)
        assert (status, body["error"]["code"]) == (429, "overloaded")
        assert (await cluster.session.post("/v1/completions", json={})).status == 404, "only the row is served"
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await cluster.nothing_open()
        assert cluster.service.admission.open_choices == 0


async def test_errors_before_and_after_the_first_byte(cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.contexts[0].behaviour.refuse = LimitExceeded("no", "x").to_info()
    status, body = await cluster.post("questions", **ASKED, live=True)
    assert (status, body["error"]["code"]) == (400, "limit_exceeded")
    monkeypatch.setattr(proxy.routes.answer, "_STATUS_WAIT_S", 0.0)
    monkeypatch.setattr(proxy.routes.event_stream, "SILENCE_S", 0.02)
    cluster.contexts[0].behaviour.hang = True
    async with cluster.session.post("/v1/questions", json={**ASKED, "live": True}) as response:
        assert await asyncio.wait_for(response.content.readuntil(b"\n\n"), 20) == b": keep-alive\n\n"
        (link,) = (link for link in cluster.fleet.members.links if link.worker_id == "context-0")
        error = LimitExceeded("no", "x").to_info()
        link._deliver(OutputFrame([], [Finished(cluster.contexts[0].received[-1].key, "error", error=error)]))
        rest = await asyncio.wait_for(response.text(), 20)
    assert parsed(rest) == [("failed", {"code": "limit_exceeded"})]
    await until(lambda: not cluster.generations[0].open_keys)


async def test_a_client_that_leaves_frees_both_workers(cluster: ProxyCluster) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.01
    async with cluster.session.post("/v1/questions", json={**ASKED, "longest": 1000, "live": True}) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await cluster.nothing_open()
    await until(lambda: cluster.service.metrics.in_flight._value.get() == 0)


async def described(cluster: ProxyCluster) -> dict[str, Any]:
    async with cluster.session.get("/openapi.json") as response:
        assert (response.status, response.content_type) == (200, "application/json")
        return await response.json()


def check(document: dict[str, Any], schema: dict[str, Any], data: object) -> None:
    """Raises jsonschema.ValidationError: `data` is not what the document says."""
    jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(data)


@pytest.mark.parametrize("more", [{}, {"logprobs": True}, {"return_token_ids": True}])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/questions"])
async def test_bodies_answers_and_events_are_what_the_description_says(
    cluster: ProxyCluster, path: str, more: dict[str, Any]
) -> None:
    say(cluster, "one two", token_delay_s=0.005)
    own: dict[str, Any] = {
        "/v1/completions": {"prompt": ["p", "q"], "n": 2, "max_tokens": 20},
        "/v1/chat/completions": {"messages": [*USER, {"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        "/v1/questions": ASKED,
    }[path]
    asks = {"model": "fake", **own, **({} if path == "/v1/questions" else more)}
    if path == "/v1/completions" and "logprobs" in asks:
        asks |= {"logprobs": 2, "echo": True}
    document = await described(cluster)
    operation = document["paths"][path]["post"]
    responses = operation["responses"]
    fits = functools.partial(check, document)
    body = operation["requestBody"]["content"]["application/json"]["schema"]
    fits(body, asks)
    with pytest.raises(jsonschema.ValidationError):
        fits(body, {**asks, "no_such_field": 1})
    async with cluster.session.post(path, json=asks) as response:
        assert response.status == 200
        fits(responses["200"]["content"]["application/json"]["schema"], await response.json())
    live = {"live": True} if path == "/v1/questions" else {"stream": True, "stream_options": {"include_usage": True}}
    fits(body, asks | live)
    async with cluster.session.post(path, json=asks | live) as response:
        data = [line[6:] for line in (await response.text()).splitlines() if line.startswith("data: ")]
    found = [json.loads(each) for each in data if each != "[DONE]"]
    events = [each for each in found if path != "/v1/questions" or "number" in each]
    assert len(events) > 3
    for each in events:
        fits(responses["200"]["content"]["text/event-stream"]["schema"], each)
    async with cluster.session.post(path, json={**asks, "model": "other"}) as response:
        fits(responses[str(response.status)]["content"]["application/json"]["schema"], await response.json())


async def test_operations_answer_what_the_description_says(cluster: ProxyCluster) -> None:
    document = await described(cluster)
    for path, methods in document["paths"].items():
        if "get" not in methods:
            continue
        (media_type, content) = next(iter(methods["get"]["responses"]["200"]["content"].items()))
        async with cluster.session.get(path.replace("{model}", "fake")) as response:
            assert (response.status, response.content_type) == (200, media_type)
            data = await (response.json() if media_type == "application/json" else response.text())
        check(document, content["schema"], data)
    await cluster.generations[0].stop()
    await until(lambda: not cluster.fleet.members.placeable("generation"))
    async with cluster.session.get("/health") as response:
        assert response.status == 503
        unready = document["paths"]["/health"]["get"]["responses"]["503"]
        check(document, unready["content"]["application/json"]["schema"], await response.json())
        assert "Retry-After" in unready["headers"]
        assert "Retry-After" in response.headers

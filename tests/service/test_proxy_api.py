"""The OpenAI surface in front of fake workers, mostly through OpenAI's own client."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

import proxy.text_work
from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import TokenDelta
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from tests.fakes.fake_worker import token_at
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, sentencepiece_tokenizer, served_model

TEXT = "héllo wörld 🙂 the quick brown fox"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster() as running:
        yield running


@pytest.fixture
async def client(cluster: ProxyCluster) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as running:
        yield running


def tokens_of(cluster: ProxyCluster, text: str) -> list[int]:
    tokenizer = cluster.model.tokenizer
    assert tokenizer is not None
    return tokenizer.encode_now(text, add_special_tokens=False)


def say(cluster: ProxyCluster, text: str, **behaviour: Any) -> list[int]:
    """Let the workers answer `text` and the end-of-sequence token."""
    script = [*tokens_of(cluster, text), 2]
    for worker in cluster.workers:
        worker.behaviour.script = script
        for name, value in behaviour.items():
            setattr(worker.behaviour, name, value)
    return script


async def events(cluster: ProxyCluster, route: str, **body: Any) -> list[Any]:
    """The data of a stream's events, which must end in [DONE]."""
    async with cluster.session.post(f"/v1/{route}", json={"model": "fake", "stream": True, **body}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        lines = [line for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_both_workers_take_part_and_know_each_other(cluster: ProxyCluster) -> None:
    await cluster.post("completions", prompt="hello", max_tokens=3, seed=9)
    (context,), (generation,) = cluster.contexts[0].received, cluster.generations[0].received
    assert (context.phase, generation.phase) == ("context", "generation")
    assert context.peer is not None
    assert generation.peer is not None
    assert (context.peer.worker_id, generation.peer.worker_id) == ("generation-0", "context-0")
    assert context.key == generation.key
    assert context.token_ids == generation.token_ids == tokens_of(cluster, "hello")
    assert context.sampling.seed == 9
    assert 0 < context.timeout_s <= cluster.config.proxy.request_timeout_s


async def test_one_token_needs_the_context_worker_only(cluster: ProxyCluster) -> None:
    status, body = await cluster.post("completions", prompt="hello", max_tokens=1)
    assert (status, body["usage"]["completion_tokens"]) == (200, 1)
    assert cluster.contexts[0].received[0].peer is None
    assert cluster.generations[0].received == []


async def test_a_first_token_that_is_the_last_frees_the_generation_worker(cluster: ProxyCluster) -> None:
    for worker in cluster.workers:
        worker.behaviour.script = [2]
    cluster.generations[0].behaviour.hang = True
    _, body = await cluster.post("completions", prompt="hello", max_tokens=9)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 1
    await cluster.nothing_open()
    assert cluster.generations[0].aborted == [cluster.contexts[0].received[0].key]


async def test_without_context_workers_generation_does_both() -> None:
    async with proxy_cluster(contexts=0) as cluster:
        status, body = await cluster.post("completions", prompt="hello", max_tokens=4, seed=1, return_token_ids=True)
        assert status == 200
        assert cluster.generations[0].received[0].phase == "both"
        length = len(tokens_of(cluster, "hello"))
        assert body["choices"][0]["token_ids"] == [token_at(1, length + i, 300) for i in range(4)]


async def test_completions_through_openais_client(cluster: ProxyCluster, client: openai.AsyncOpenAI) -> None:
    script = say(cluster, TEXT, cached_tokens=3)
    whole = await client.completions.create(model="fake", prompt="p", max_tokens=200)
    assert whole.choices[0].text == TEXT
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(script)
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    assert whole.id.startswith("cmpl-")
    stream = await client.completions.create(
        model="fake", prompt="p", max_tokens=200, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


async def test_chat_through_openais_client(cluster: ProxyCluster, client: openai.AsyncOpenAI) -> None:
    say(cluster, TEXT)
    whole = await client.chat.completions.create(model="fake", messages=USER)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == TEXT
    assert whole.choices[0].message.role == "assistant"
    received = cluster.contexts[0].received[0]
    assert received.token_ids == tokens_of(cluster, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert received.sampling.max_tokens == 2048 - len(received.token_ids), "the rest of the context"
    stream = await client.chat.completions.create(model="fake", messages=USER, stream=True)  # type: ignore[arg-type]
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_a_conversation_goes_on_with_the_message_as_the_client_has_it(
    cluster: ProxyCluster, client: openai.AsyncOpenAI
) -> None:
    say(cluster, "first")
    first = await client.chat.completions.create(model="fake", messages=USER)  # type: ignore[arg-type]
    returned = first.choices[0].message.model_dump()
    assert None in returned.values()
    further = [*USER, returned, *USER]
    second = await client.chat.completions.create(model="fake", messages=further)  # type: ignore[arg-type]
    assert second.choices[0].message.content == "first"
    assert cluster.contexts[0].received[1].token_ids == tokens_of(
        cluster,
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    )


@pytest.mark.parametrize("seed", range(6))
async def test_stream_and_whole_agree_whatever_the_deltas(cluster: ProxyCluster, seed: int) -> None:
    shuffler = random.Random(seed)

    def shuffle(deltas: list[TokenDelta]) -> list[TokenDelta]:
        doubled = [*deltas, *shuffler.sample(deltas, len(deltas) // 2)]
        shuffler.shuffle(doubled)
        return doubled

    say(cluster, TEXT * 3, chunks=[shuffler.randint(1, 5) for _ in range(7)], shuffle=shuffle, ahead=seed % 2 == 0)
    fields: dict[str, Any] = {"prompt": "p", "max_tokens": 500, "stop": ["fox🙂", "fox the", "x never"], "logprobs": 1}
    _, whole = await cluster.post("completions", **fields)
    chunks = await events(cluster, "completions", **fields)
    assert whole["choices"][0]["text"] == TEXT * 3
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT * 3
    streamed = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
    assert streamed == whole["choices"][0]["logprobs"]["tokens"]


async def test_the_first_token_may_come_after_the_second(cluster: ProxyCluster) -> None:
    cluster.contexts[0].behaviour.first_token_delay_s = 0.05
    cluster.generations[0].behaviour.ahead = True
    _, body = await cluster.post("completions", prompt="hello", max_tokens=5, seed=1, return_token_ids=True)
    length = len(tokens_of(cluster, "hello"))
    assert body["choices"][0]["token_ids"] == [token_at(1, length + i, 300) for i in range(5)]


async def test_the_first_token_does_not_wait_for_the_second(cluster: ProxyCluster) -> None:
    cluster.contexts[0].behaviour.omit_handoff = True
    cluster.generations[0].behaviour.hang = True
    fields = {"model": "fake", "prompt": "hello", "max_tokens": 5, "stream": True}
    async with cluster.session.post("/v1/completions", json=fields) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b'data: {"id":"cmpl-')
    await cluster.nothing_open()


@pytest.mark.parametrize("chunks", [[1], [3], [50]])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_ends_text_and_both_workers(
    cluster: ProxyCluster, chunks: list[int], streamed: bool
) -> None:
    say(cluster, TEXT, chunks=chunks, token_delay_s=0.01)
    fields: dict[str, Any] = {
        "prompt": "p",
        "max_tokens": 200,
        "stop": ["ld 🙂 the", "brown"],
        "return_token_ids": True,
    }
    if streamed:
        pieces = [chunk["choices"][0] for chunk in await events(cluster, "completions", **fields)]
        text, reason = "".join(piece["text"] for piece in pieces), pieces[-1]["finish_reason"]
        token_ids = [token_id for piece in pieces for token_id in piece["token_ids"]]
    else:
        _, body = await cluster.post("completions", **fields)
        text, reason = body["choices"][0]["text"], body["choices"][0]["finish_reason"]
        token_ids = body["choices"][0]["token_ids"]
        assert body["usage"]["completion_tokens"] == len(token_ids)
    assert (text, reason) == ("héllo wör", "stop")
    decoded = cluster.model.tokenizer.decode(token_ids)  # type: ignore[union-attr]
    assert "ld 🙂 the" in decoded
    assert "brown" not in decoded
    await cluster.nothing_open()
    if chunks == [1]:
        assert cluster.generations[0].aborted == [cluster.generations[0].received[0].key]


async def test_stop_strings_wait_for_min_tokens_and_may_be_included(cluster: ProxyCluster) -> None:
    say(cluster, "abcabc")
    _, body = await cluster.post("completions", prompt="p", max_tokens=20, stop="c", min_tokens=4)
    assert body["choices"][0]["text"] == "abcab"
    _, body = await cluster.post("completions", prompt="p", max_tokens=20, stop="c", include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "abc"


async def test_stop_tokens_are_no_text_unless_asked_for(cluster: ProxyCluster) -> None:
    say(cluster, "abc")
    (last,) = tokens_of(cluster, "c")
    for worker in cluster.workers:
        worker.behaviour.script = tokens_of(cluster, "abc")
    fields: dict[str, Any] = {"prompt": "p", "max_tokens": 20, "stop_token_ids": [last]}
    _, body = await cluster.post("completions", **fields)
    assert body["choices"][0]["text"] == "ab"
    _, body = await cluster.post("completions", **fields, include_stop_str_in_output=True)
    assert body["choices"][0]["text"] == "abc"


async def test_lists_of_prompts_and_n_give_every_choice_its_seed(cluster: ProxyCluster) -> None:
    fields: dict[str, Any] = {
        "prompt": [[5, 6], [7, 8, 9]],
        "n": 2,
        "max_tokens": 4,
        "seed": 11,
        "return_token_ids": True,
    }
    _, body = await cluster.post("completions", **fields)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 5
    assert body["usage"]["completion_tokens"] == 16
    seeds = {request.key.request_id[-1]: request.sampling.seed for request in cluster.contexts[0].received}
    assert seeds["0"] == seeds["2"] == 11
    assert seeds["1"] == seeds["3"] != 11
    assert body["choices"][2]["token_ids"] == [token_at(11, 3 + i, 300) for i in range(4)]
    chunks = await events(cluster, "completions", **fields)
    for choice in body["choices"]:
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]


async def test_legacy_logprobs_line_up_with_the_text(cluster: ProxyCluster) -> None:
    say(cluster, "hello fox")
    _, body = await cluster.post("completions", prompt="the quick", max_tokens=50, logprobs=2, echo=True)
    (choice,) = body["choices"]
    logprobs, text = choice["logprobs"], choice["text"]
    assert text == "the quickhello fox"
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value == -0.5 for value in logprobs["token_logprobs"][1:])
    ends = [*logprobs["text_offset"][1:], len(text)]
    spans = [text[start:end] for start, end in zip(logprobs["text_offset"], ends, strict=True)]
    assert spans[:-1] == logprobs["tokens"][:-1]
    assert logprobs["tokens"][-1] == "<|im_end|>"
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:-1])


async def test_echo_alone_costs_no_output(cluster: ProxyCluster) -> None:
    status, body = await cluster.post("completions", prompt="the quick", max_tokens=0, echo=True, logprobs=0)
    assert status == 200
    assert body["choices"][0]["text"] == "the quick"
    assert len(body["choices"][0]["logprobs"]["tokens"]) == len(tokens_of(cluster, "the quick"))
    assert body["usage"]["completion_tokens"] == 0
    (first, *_) = await events(cluster, "completions", prompt=tokens_of(cluster, "the quick"), max_tokens=3, echo=True)
    assert first["choices"][0]["text"].startswith("the quick")


async def test_chat_logprobs_have_bytes(cluster: ProxyCluster, client: openai.AsyncOpenAI) -> None:
    script = say(cluster, "é🙂")
    answer = await client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=3)  # type: ignore[arg-type]
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content) == len(script)
    assert bytes(byte for token in content[:-1] for byte in token.bytes or []).decode() == "é🙂"
    assert all(len(token.top_logprobs) == 3 for token in content)


async def test_sentencepiece_text_continues_the_prompt() -> None:
    rust = sentencepiece_tokenizer()
    async with proxy_cluster(model=served_model(tokenizer=Tokenizer(rust), vocab_size=400)) as cluster:
        for worker in cluster.workers:
            worker.behaviour.script = rust.encode("the fox", add_special_tokens=False).ids
        _, body = await cluster.post("completions", prompt="hello", max_tokens=50, echo=True)
        assert body["choices"][0]["text"] == "hello the fox"
        assert cluster.contexts[0].received[0].token_ids[0] == 1, "<s> in front"
        await cluster.post("completions", prompt="hello", max_tokens=5, add_special_tokens=False)
        assert cluster.contexts[0].received[1].token_ids[0] != 1


async def test_without_a_tokenizer_tokens_go_in_and_out() -> None:
    async with proxy_cluster(model=served_model(tokenizer=None, template=None, vocab_size=500)) as cluster:
        chunks = await events(cluster, "completions", prompt=[5, 6], max_tokens=4, seed=2, return_token_ids=True)
        assert [chunk["choices"][0]["text"] for chunk in chunks] == [""] * len(chunks)
        token_ids = [token_id for chunk in chunks for token_id in chunk["choices"][0]["token_ids"]]
        assert token_ids == [token_at(2, 2 + i, 500) for i in range(4)]
        for route, fields, param in (
            ("completions", {"prompt": "x"}, "prompt"),
            ("completions", {"prompt": [1], "stop": "x"}, "stop"),
            ("chat/completions", {"messages": USER}, "messages"),
        ):
            status, body = await cluster.post(route, **fields)
            assert (status, body["error"]["param"]) == (400, param)


async def test_a_developer_message_reaches_the_worker_as_the_systems_and_a_lost_one_is_refused() -> None:
    source = "{% for m in messages if m.role in ('system', 'user') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    async with proxy_cluster(model=served_model(template=ChatTemplate(source, {}))) as cluster:
        status, _ = await cluster.post(
            "chat/completions", messages=[{"role": "developer", "content": "be brief"}, *USER], max_tokens=1
        )
        assert status == 200
        (received,) = cluster.contexts[0].received
        assert received.token_ids == tokens_of(cluster, f"<system>be brief<user>{USER[0]['content']}")
        status, body = await cluster.post(
            "chat/completions", messages=[*USER, {"role": "assistant", "content": "yes"}, *USER], max_tokens=1
        )
        assert (status, body["error"]["param"]) == (400, "messages.1.role")


async def test_the_models_defaults_reach_the_workers_where_the_client_says_nothing() -> None:
    defaults = GenerationDefaults(temperature=0.0, repetition_penalty=1.1, min_p=0.1, max_tokens=7)
    async with proxy_cluster(model=served_model(defaults=defaults)) as cluster:
        await cluster.post("chat/completions", messages=USER)
        await cluster.post("chat/completions", messages=USER, max_tokens=9, repetition_penalty=1.0, temperature=0.5)
        first, second = (request.sampling for request in cluster.generations[0].received)
    assert (first.temperature, first.repetition_penalty, first.min_p, first.max_tokens) == (0.0, 1.1, 0.1, 7)
    assert (second.temperature, second.repetition_penalty, second.min_p, second.max_tokens) == (0.5, 1.0, 0.1, 9)


async def test_a_long_prompt_is_the_same_as_a_short_one(cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.text_work, "_INLINE_CHARACTERS", 100)
    text = "the quick brown fox " * 50
    status, body = await cluster.post("completions", prompt=text, max_tokens=1)
    assert status == 200
    assert cluster.contexts[0].received[0].token_ids == tokens_of(cluster, text)
    assert body["usage"]["prompt_tokens"] == len(tokens_of(cluster, text))


async def test_a_single_choice_appears_token_by_token(cluster: ProxyCluster) -> None:
    cluster.generations[0].behaviour.token_delay_s = 0.02
    chunks = await events(cluster, "completions", prompt="hello", max_tokens=6)
    assert len(chunks) >= 6


async def test_request_ids_are_echoed_or_made(cluster: ProxyCluster) -> None:
    async with cluster.session.get("/version", headers={"X-Request-Id": "mine-1"}) as response:
        assert response.headers["X-Request-Id"] == "mine-1"
    async with cluster.session.get("/nowhere", headers={"X-Request-Id": "bad id"}) as response:
        assert response.headers["X-Request-Id"].startswith("req-")
    fields = {"model": "fake", "prompt": "p", "stream": True}
    async with cluster.session.post("/v1/completions", json=fields, headers={"X-Request-Id": "mine-2"}) as response:
        assert response.headers["X-Request-Id"] == "mine-2"
    assert cluster.contexts[0].received[0].key.request_id.startswith("cmpl-")


async def test_metrics_count_what_happened(cluster: ProxyCluster) -> None:
    say(cluster, "ab")
    await cluster.post("completions", prompt="hello", max_tokens=9)
    await cluster.post("completions", prompt=3)
    await events(cluster, "completions", prompt="hello", max_tokens=9)
    async with cluster.session.get("/metrics") as response:
        text = await response.text()
    for line in (
        'pdserve_proxy_requests_total{route="/v1/completions",status="200"} 2.0',
        'pdserve_proxy_requests_total{route="/v1/completions",status="400"} 1.0',
        "pdserve_proxy_output_tokens_total 6.0",
        f"pdserve_proxy_prompt_tokens_total {2.0 * len(tokens_of(cluster, 'hello'))}",
        "pdserve_proxy_ttft_seconds_count 2.0",
        'pdserve_proxy_ttft_seconds_bucket{le="300.0"} 2.0',
        'pdserve_proxy_ttft_seconds_bucket{le="+Inf"} 2.0',
        "pdserve_proxy_e2e_seconds_count 2.0",
        "pdserve_proxy_handoff_gap_seconds_count 0.0",
        "pdserve_proxy_submit_overhead_seconds_count 2.0",
        "pdserve_proxy_requests_in_flight 0.0",
        'pdserve_proxy_worker_connections{role="generation"} 1.0',
    ):
        assert line in text


async def test_models_are_listed(client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == ["fake"]
    assert (await client.models.retrieve("fake")).owned_by == "pdserve"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other/model")

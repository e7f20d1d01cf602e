"""`/tokenize` and `/detokenize`: vLLM's form, the tokens that a request would have, and the limits of all requests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

import proxy.routes.tokens
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.proxy_cluster import ProxyCluster, proxy_cluster, sentencepiece_tokenizer, served_model, until
from tests.service.test_proxy_api import TEXT, USER, tokens_of

CHAT = "<|im_start|>user\nhi<|im_end|>\n"


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster() as running:
        yield running


async def post(cluster: ProxyCluster, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
    async with cluster.session.post(path, json=body) as response:
        return response.status, await response.json()


async def test_a_prompt_as_tokens_and_back(cluster: ProxyCluster) -> None:
    expected = tokens_of(cluster, TEXT)
    status, body = await post(cluster, "/tokenize", model="fake", prompt=TEXT)
    assert (status, body) == (200, {"count": len(expected), "max_model_len": 2048, "tokens": expected})
    assert await post(cluster, "/detokenize", model="fake", tokens=expected) == (200, {"prompt": TEXT})
    assert await post(cluster, "/tokenize", prompt="") == (200, {"count": 0, "max_model_len": 2048, "tokens": []})
    assert await post(cluster, "/detokenize", tokens=[]) == (200, {"prompt": ""})


async def test_a_conversation_has_the_tokens_that_a_chat_request_has(cluster: ProxyCluster) -> None:
    status, body = await post(cluster, "/tokenize", messages=USER)
    await cluster.post("chat/completions", messages=USER, max_tokens=1)
    assert (status, body["tokens"]) == (200, cluster.contexts[0].received[0].token_ids)
    assert body["tokens"] == tokens_of(cluster, CHAT + "<|im_start|>assistant\n")
    _, body = await post(cluster, "/tokenize", messages=USER, add_generation_prompt=False)
    assert body["tokens"] == tokens_of(cluster, CHAT)
    _, body = await post(cluster, "/tokenize", messages=USER, chat_template_kwargs={"messages_of": 1})
    assert body["count"] == len(tokens_of(cluster, CHAT + "<|im_start|>assistant\n"))


async def test_special_tokens_are_added_to_prompts_alone() -> None:
    async with proxy_cluster(model=served_model(tokenizer=Tokenizer(sentencepiece_tokenizer()))) as cluster:
        _, body = await post(cluster, "/tokenize", prompt="the", return_token_strs=True)
        assert body["tokens"][0] == 1
        assert body["token_strs"] == ["<s>", "▁the"]
        _, body = await post(cluster, "/tokenize", prompt="the", add_special_tokens=False, return_token_strs=True)
        assert body["token_strs"] == ["▁the"]
        _, body = await post(cluster, "/tokenize", messages=USER)
        assert body["tokens"][0] != 1
        _, body = await post(cluster, "/tokenize", messages=USER, add_special_tokens=True)
        assert body["tokens"][0] == 1


@pytest.mark.parametrize(
    ("path", "fields", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, None),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, 400, "add_generation_prompt"),
        ("/tokenize", {"messages": USER, "tools": [{}]}, 400, "tools"),
        ("/tokenize", {"prompt": "a", "colour": 1}, 400, "colour"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [300]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**70]}, 400, None),
        ("/detokenize", {"tokens": [5], "model": "other"}, 404, "model"),
    ],
)
async def test_mistakes_are_named(
    cluster: ProxyCluster, path: str, fields: dict[str, Any], status: int, param: str | None
) -> None:
    found, body = await post(cluster, path, **fields)
    assert found == status, body
    if param is not None:
        assert body["error"]["param"] == param


async def test_without_a_tokenizer_or_workers_the_reason_is_named() -> None:
    async with proxy_cluster(model=served_model(tokenizer=None, template=None)) as cluster:
        for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            status, body = await post(cluster, path, **fields)
            assert (status, "no tokenizer" in body["error"]["message"]) == (400, True)
    async with proxy_cluster(connect=False) as cluster:
        for path, fields in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [70]})):
            assert (await post(cluster, path, **fields))[1]["error"]["code"] == "not_ready"


async def test_what_is_longer_than_the_context_is_counted_off_the_event_loop(
    cluster: ProxyCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, in_loop = asyncio.get_running_loop(), 0
    text = "the quick brown fox " * 500
    expected = tokens_of(cluster, text)

    def watched(name: str) -> None:
        work = getattr(Tokenizer, name)

        def watch(*arguments: Any) -> Any:
            nonlocal in_loop
            in_loop += asyncio._get_running_loop() is loop
            return work(*arguments)

        monkeypatch.setattr(Tokenizer, name, watch)

    for name in ("encode_now", "encode_batch", "decode", "pieces"):
        watched(name)
    monkeypatch.setattr(proxy.routes.tokens, "_ENCODED_AT_ONCE", 1000)
    status, body = await post(cluster, "/tokenize", prompt=text, return_token_strs=True)
    assert (status, body["count"], body["max_model_len"]) == (200, len(expected), 2048)
    assert body["count"] > 2048
    assert body["tokens"] == expected
    assert len(body["token_strs"]) == len(expected)
    assert await post(cluster, "/detokenize", tokens=expected) == (200, {"prompt": text})
    assert in_loop == 0


@pytest.mark.parametrize("length", [8193, 60_000, 600_000])
async def test_what_is_longer_than_four_contexts_is_refused(cluster: ProxyCluster, length: int) -> None:
    for path, fields in (("/tokenize", {"prompt": "z" * length}), ("/detokenize", {"tokens": [70] * length})):
        status, body = await post(cluster, path, **fields)
        assert (status, body["error"]["code"]) == (400, "limit_exceeded")
        assert body["error"]["param"] == next(iter(fields))
        assert "8192 tokens" in body["error"]["message"]
    assert (await post(cluster, "/tokenize", prompt="z" * 8192))[1]["count"] == 8192
    assert cluster.service.admission.open_choices == 0


async def test_places_bytes_and_tokens_count_as_those_of_all_requests() -> None:
    async with proxy_cluster(max_concurrent_requests=1, max_total_prompt_tokens=500) as cluster:
        for path, fields in (("/tokenize", {"prompt": "z" * 501}), ("/detokenize", {"tokens": [70] * 501})):
            status, body = await post(cluster, path, **fields)
            assert (status, body["error"]["code"]) == (400, "limit_exceeded")
            assert body["error"]["param"] == next(iter(fields))
        cluster.generations[0].behaviour.hang = True
        slow = asyncio.create_task(cluster.post("completions", prompt="p", max_tokens=5))
        await until(lambda: len(cluster.generations[0].received) == 1)
        for path, fields in (("/tokenize", {"prompt": "z"}), ("/detokenize", {"tokens": [70]})):
            assert (await post(cluster, path, **fields))[1]["error"]["code"] == "overloaded"
        slow.cancel()
        await asyncio.gather(slow, return_exceptions=True)
        await cluster.nothing_open()
        assert (await post(cluster, "/tokenize", prompt="z"))[0] == 200
        assert cluster.service.admission.open_choices == 0
    async with proxy_cluster(max_body_bytes=1024) as cluster:
        assert (await post(cluster, "/tokenize", prompt="z" * 1024))[0] == 413
    async with proxy_cluster() as cluster:
        cluster.service.admission.draining = True
        assert (await post(cluster, "/tokenize", prompt="z"))[1]["error"]["code"] == "draining"


def test_many_tokens_have_the_text_that_few_have(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(sentencepiece_tokenizer())
    ids = random.Random(5).choices(tokenizer.encode_now(TEXT * 3), k=3000)
    at_once = tokenizer.decode(ids)
    monkeypatch.setattr("pdserve.text.tokenizer._DECODED_AT_ONCE", 10)
    assert tokenizer.decode(ids) == at_once

"""The whole cluster against transformers: same tokens, however they are asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from openai import AsyncOpenAI, NotFoundError, OpenAI

from tests.cluster import MODEL, Cluster
from tests.e2e.reference import NEW_TOKENS, PROMPTS, Reference


def greedy(prompt: str | list[int], **extra: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, **extra}


async def complete(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> dict[str, Any]:
    async with session.post(f"{url}/v1/completions", json=body) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> tuple[str, list[int], int]:
    """Text, token ids and number of events of a streamed completion."""
    text, tokens, events = "", [], 0
    async with session.post(f"{url}/v1/completions", json={**body, "stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                events += 1
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
                tokens += choice.get("token_ids") or []
    return text, tokens, events


async def test_twenty_prompts_one_at_a_time(cluster: Cluster, reference: Reference) -> None:
    async with aiohttp.ClientSession() as session:
        for prompt in PROMPTS:
            answer = await complete(session, cluster.url, greedy(prompt, return_token_ids=True))
            choice = answer["choices"][0]
            assert choice["text"] == reference.text(prompt, guess=choice["token_ids"])
            assert answer["usage"]["prompt_tokens"] == len(reference.encode(prompt))


async def test_twenty_prompts_sixteen_at_once_streamed(cluster: Cluster, reference: Reference) -> None:
    gate = asyncio.Semaphore(16)

    async def one(session: aiohttp.ClientSession, prompt: str) -> tuple[str, list[int], int]:
        async with gate:
            return await stream(session, cluster.url, greedy(prompt, return_token_ids=True))

    async with aiohttp.ClientSession() as session:
        answers = await asyncio.gather(*(one(session, prompt) for prompt in PROMPTS))
    for prompt, (text, tokens, events) in zip(PROMPTS, answers, strict=True):
        assert tokens[: len(reference.greedy(prompt))] == reference.greedy(prompt)
        assert text == reference.text(prompt)
        assert events > len(tokens) // 2, "tokens arrive as they are made, not all at the end"


async def test_token_ids_in_and_the_same_tokens_out(cluster: Cluster, reference: Reference) -> None:
    ids = reference.encode(PROMPTS[0])
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, cluster.url, greedy(ids, return_token_ids=True))
    assert answer["choices"][0]["token_ids"] == reference.greedy(ids)


async def test_every_disaggregated_request_moves_its_kv(cluster: Cluster, reference: Reference) -> None:
    config_bytes_per_token = 30 * 2 * 3 * 64 * 4
    prompt = [5000 + n for n in range(70)]
    name = "pdserve_kv_transfer_bytes_total"
    sent = cluster.metric("context-0", name, direction="sent", backend="UCX")
    received = cluster.metric("generation-0", name, direction="received", backend="UCX")
    async with aiohttp.ClientSession() as session:
        await complete(session, cluster.url, greedy(prompt))
    await asyncio.sleep(0.5)
    assert cluster.metric("context-0", name, direction="sent", backend="UCX") - sent >= 70 * config_bytes_per_token
    grown = cluster.metric("generation-0", name, direction="received", backend="UCX") - received
    assert grown >= 70 * config_bytes_per_token


async def test_a_seeded_sample_is_the_same_alone_and_in_company(cluster: Cluster) -> None:
    body = {"model": MODEL, "prompt": "Tell me a story.", "max_tokens": 16, "temperature": 0.9, "seed": 1234}
    async with aiohttp.ClientSession() as session:
        alone = await complete(session, cluster.url, body)
        others = [complete(session, cluster.url, {**body, "seed": n, "prompt": f"{n} apples"}) for n in range(6)]
        together, *rest = await asyncio.gather(complete(session, cluster.url, body), *others)
    assert together["choices"][0]["text"] == alone["choices"][0]["text"]
    assert len({answer["choices"][0]["text"] for answer in rest}) > 1


def test_chat_with_the_openai_client(cluster: Cluster) -> None:
    client = OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [MODEL]
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=24)
    assert "Paris" in (whole.choices[0].message.content or "")
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=messages,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    told, usage = chunks[-1].usage, whole.usage
    assert told is not None
    assert usage is not None
    assert (told.prompt_tokens, told.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="gpt-9", messages=messages)


async def test_logprobs_and_n_with_the_openai_client(cluster: Cluster) -> None:
    client = AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    answer = await client.completions.create(
        model=MODEL, prompt="One, two,", max_tokens=4, temperature=0.8, seed=5, n=3, logprobs=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert all(value <= 0 for value in choice.logprobs.token_logprobs or [])
        assert all(len(top) >= 2 for top in choice.logprobs.top_logprobs or [])


async def test_echoed_prompt_logprobs_equal_transformers(cluster: Cluster, reference: Reference) -> None:
    import torch

    prompt = PROMPTS[1]
    ids = torch.tensor([reference.encode(prompt)])
    with torch.inference_mode():
        logits = reference._model(ids).logits[0].log_softmax(-1)
    expected = [logits[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, cluster.url, greedy(prompt, max_tokens=0, echo=True, logprobs=1))
    assert answer["choices"][0]["text"] == prompt
    got = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert got[0] is None
    assert got[1:] == pytest.approx(expected, abs=2e-3)


async def test_a_stop_string_ends_the_text_before_it(cluster: Cluster, reference: Reference) -> None:
    whole = reference.text(PROMPTS[1])
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    async with aiohttp.ClientSession() as session:
        answer = await complete(session, cluster.url, greedy(PROMPTS[1], stop=[stop]))
        text, _, _ = await stream(session, cluster.url, greedy(PROMPTS[1], stop=stop))
    assert answer["choices"][0]["text"] == whole[: whole.index(stop)] == text
    assert answer["choices"][0]["finish_reason"] == "stop"

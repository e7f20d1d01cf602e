"""Tool calls and reasoning through the proxy, as OpenAI's client reads them, streamed and in one piece."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tokenizers import AddedToken

from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from proxy.parsers import REASONING_FORMATS, TOOL_FORMATS
from tests.fakes.proxy_cluster import TEMPLATE, ProxyCluster, byte_level_tokenizer, proxy_cluster, served_model
from tests.service.test_proxy_api import USER, events, say, tokens_of
from tests.service.test_proxy_endpoints import check, described
from tests.unit.test_chat_tools import MESSAGES, QWEN2_5, TOOL
from tests.unit.test_parsers import CALLS, WHOLE

REASONING = "<think>\nHm, where?\n</think>\n\n"
BEFORE = {name: "" if name == "llama3_json" else "I look.\n\n" for name in TOOL_FORMATS}


def model_of(tools: str | None, reasoning: str | None = "qwen3", template: str = QWEN2_5) -> Any:
    """A model whose markers are special tokens, beside another special token, <|other|>."""
    tokenizer = byte_level_tokenizer()
    markers = [*(TOOL_FORMATS[tools].markers if tools else ()), *(REASONING_FORMATS["qwen3"].markers), "<|other|>"]
    tokenizer.add_special_tokens([AddedToken(marker, special=True) for marker in markers])
    made = Tokenizer(tokenizer)
    return served_model(
        tokenizer=made,
        vocab_size=made.vocab_size,
        template=ChatTemplate(template, {}),
        tools=TOOL_FORMATS[tools] if tools else None,
        reasoning=REASONING_FORMATS[reasoning] if reasoning else None,
    )


@pytest.fixture
async def cluster() -> AsyncIterator[ProxyCluster]:
    async with proxy_cluster(model=model_of("hermes")) as running:
        yield running


def without_ids(calls: Any) -> list[tuple[str, str]]:
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert re.fullmatch("[a-zA-Z0-9]{9}", call.id)
        assert call.type == "function"
    return [(call.function.name, call.function.arguments) for call in calls]


async def whole(cluster: ProxyCluster, **fields: Any) -> Any:
    status, body = await cluster.post("chat/completions", **{"messages": USER, "tools": [TOOL], **fields})
    assert status == 200, body
    return ChatCompletion.model_validate(body, strict=True).choices[0]


async def streamed(cluster: ProxyCluster, **fields: Any) -> Any:
    """The choice that the stream's events add up to, by the rules of OpenAI's API."""
    body = {"messages": USER, "tools": [TOOL], **fields}
    chunks = [ChatCompletionChunk.model_validate(each) for each in await events(cluster, "chat/completions", **body)]
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for number, chunk in enumerate(chunks):
        (choice,) = chunk.choices
        delta = choice.delta
        message["content"] += delta.content or ""
        message["reasoning_content"] += getattr(delta, "reasoning_content", "")
        assert (choice.finish_reason is None) == (number < len(chunks) - 1)
        assert len(delta.tool_calls or []) <= 1
        for call in delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(message["tool_calls"])
                assert call.function is not None
                assert (call.type, call.function.arguments) == ("function", "")
                message["tool_calls"].append(call)
            else:
                assert call.index == len(message["tool_calls"]) - 1
                message["tool_calls"][-1].function.arguments += call.function.arguments
    return choice.finish_reason, message


async def same(cluster: ProxyCluster, **fields: Any) -> Any:
    """The answer in one piece, after a stream that agreed with it."""
    choice = await whole(cluster, **fields)
    reason, message = await streamed(cluster, **fields)
    assert reason == choice.finish_reason
    assert message["content"] == (choice.message.content or "")
    assert message["reasoning_content"] == getattr(choice.message, "reasoning_content", "")
    assert without_ids(message["tool_calls"]) == without_ids(choice.message.tool_calls or [])
    return choice


@pytest.mark.parametrize("chunks", [[1], [3, 1, 7], [500]])
@pytest.mark.parametrize("name", TOOL_FORMATS)
async def test_calls_content_and_reasoning_are_told_apart(name: str, chunks: list[int]) -> None:
    async with proxy_cluster(model=model_of(name)) as cluster:
        say(cluster, f"<|other|>{REASONING}{BEFORE[name]}{WHOLE[name]}", chunks=chunks)
        choice = await same(cluster)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == (BEFORE[name].rstrip() or None)
        assert choice.message.reasoning_content == "Hm, where?"
        assert without_ids(choice.message.tool_calls) == CALLS


async def test_openais_client_reads_calls_and_sends_their_results(cluster: ProxyCluster) -> None:
    say(cluster, WHOLE["hermes"])
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "fake", "messages": USER, "tools": [TOOL], "tool_choice": "auto"}
        first = await client.chat.completions.create(**asked)
        calls = first.choices[0].message.tool_calls or []
        assert without_ids(calls) == CALLS
        results = [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
        say(cluster, "It is sunny.")
        asked["messages"] = [*USER, first.choices[0].message.model_dump(), *results]
        second = await client.chat.completions.create(**asked)
        assert (second.choices[0].message.content, second.choices[0].finish_reason) == ("It is sunny.", "stop")
        assert second.choices[0].message.tool_calls is None
        shown = cluster.model.tokenizer.decode(cluster.contexts[0].received[-1].token_ids)  # type: ignore[union-attr]
        assert shown.count("<tool_response>\nsunny") == 2
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"' in shown
        say(cluster, WHOLE["hermes"])
        async with client.chat.completions.stream(**{**asked, "messages": USER}) as stream:
            final = await stream.get_final_completion()
        assert without_ids(final.choices[0].message.tool_calls) == CALLS


async def test_markup_that_nobody_asked_for_is_text_without_special_tokens(cluster: ProxyCluster) -> None:
    say(cluster, REASONING + WHOLE["hermes"])
    plain = WHOLE["hermes"].replace("<tool_call>", "").replace("</tool_call>", "")
    for fields in ({"tools": None}, {"tools": []}, {"tool_choice": "none"}):
        choice = await same(cluster, **fields)
        assert choice.message.content == plain.lstrip()
        assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
        assert choice.message.reasoning_content == "Hm, where?"
        shown = cluster.model.tokenizer.decode(cluster.contexts[0].received[-1].token_ids)  # type: ignore[union-attr]
        assert "# Tools" not in shown
    async with proxy_cluster(model=model_of("hermes", None)) as other:
        say(other, REASONING + WHOLE["hermes"])
        choice = await same(other)
        assert choice.message.content == REASONING.replace("<think>", "").replace("</think>", "").rstrip()
        assert not hasattr(choice.message, "reasoning_content")


async def test_malformed_calls_and_ordinary_text_are_content(cluster: ProxyCluster) -> None:
    for text in ("<tool_call>{}</tool_call> ", " just text\n", " "):
        say(cluster, text)
        choice = await same(cluster)
        assert (choice.message.content, choice.finish_reason) == (text, "stop")


async def test_a_cut_call_ends_for_its_length(cluster: ProxyCluster) -> None:
    script = say(cluster, WHOLE["hermes"])
    choice = await same(cluster, max_tokens=len(script) - 10)
    assert choice.finish_reason == "length"
    found = without_ids(choice.message.tool_calls)
    assert found[0] == CALLS[0]


async def test_one_call_only(cluster: ProxyCluster) -> None:
    say(cluster, WHOLE["hermes"])
    choice = await same(cluster, parallel_tool_calls=False)
    assert without_ids(choice.message.tool_calls) == CALLS[:1]
    assert without_ids((await same(cluster, parallel_tool_calls=True)).message.tool_calls) == CALLS


async def test_a_tag_in_the_prompt_opens_the_answer() -> None:
    template = QWEN2_5.replace("assistant\\n' }}\n{%- endif %}\n", "assistant\\n<think>\\n' }}\n{%- endif %}\n")
    assert template != QWEN2_5
    async with proxy_cluster(model=model_of("hermes", template=template)) as cluster:
        say(cluster, "Hm.\n</think>\n\nYes.")
        choice = await same(cluster)
        assert (choice.message.reasoning_content, choice.message.content) == ("Hm.", "Yes.")


async def test_choices_tokens_and_scores_go_with_the_parts(cluster: ProxyCluster) -> None:
    script = say(cluster, REASONING + WHOLE["hermes"])
    fields = {"messages": USER, "tools": [TOOL], "n": 2, "logprobs": True, "return_token_ids": True}
    chunks = await events(cluster, "chat/completions", **fields)
    for index in range(2):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [each for choice in own for each in choice.get("token_ids", [])] == script
        assert sum(len((choice["logprobs"] or {"content": []})["content"]) for choice in own) == len(script)
        assert own[-1]["finish_reason"] == "tool_calls"
    _, body = await cluster.post("chat/completions", **fields)
    for choice in body["choices"]:
        assert choice["token_ids"] == script
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather", "time"]


async def test_bodies_answers_and_events_are_what_the_description_says(cluster: ProxyCluster) -> None:
    say(cluster, REASONING + BEFORE["hermes"] + WHOLE["hermes"])
    document = await described(cluster)
    operation = document["paths"]["/v1/chat/completions"]["post"]
    content = operation["responses"]["200"]["content"]
    fields: dict[str, Any] = {"messages": MESSAGES, "tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True}
    check(document, operation["requestBody"]["content"]["application/json"]["schema"], {"model": "fake", **fields})
    _, body = await cluster.post("chat/completions", **fields)
    check(document, content["application/json"]["schema"], body)
    for each in await events(cluster, "chat/completions", **fields):
        check(document, content["text/event-stream"]["schema"], each)


@pytest.mark.parametrize(
    ("tools", "template", "fields", "param", "words"),
    [
        (None, QWEN2_5, {}, "tools", "proxy.tool_parser"),
        ("hermes", TEMPLATE, {}, "tools", "no place for tools"),
        ("hermes", QWEN2_5, {"tool_choice": "required"}, "tool_choice", "guided decoding"),
        ("hermes", QWEN2_5, {"tools": [{}]}, "tools.0.type", "required"),
        (None, TEMPLATE, {"tools": None, "messages": MESSAGES}, "messages.1.tool_calls", "leaves out tool calls"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_served_is_refused_by_name(
    tools: str | None, template: str, fields: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    async with proxy_cluster(model=model_of(tools, template=template)) as cluster:
        asked = {"messages": USER, "tools": [TOOL], "stream": stream, **fields}
        status, body = await cluster.post("chat/completions", **asked)
        assert (status, body["error"]["param"]) == (400, param)
        assert words in body["error"]["message"]
        assert not cluster.contexts[0].received


async def test_stop_strings_still_end_the_text(cluster: ProxyCluster) -> None:
    say(cluster, "one two three" + WHOLE["hermes"], token_delay_s=0.002)
    choice = await same(cluster, stop=[" three"])
    assert (choice.message.content, choice.finish_reason) == ("one two", "stop")
    assert len(tokens_of(cluster, "<tool_call>")) == 1
    await cluster.nothing_open()

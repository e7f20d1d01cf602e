"""Tools in requests: what is accepted, what is refused and by which name, and what the chat template sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from pdserve.errors import RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.chat_template import ChatTemplate
from proxy.schemas.chat import ChatCompletionRequest
from proxy.schemas.tools import MAX_TOOLS
from tests.fakes.proxy_cluster import byte_level_tokenizer

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "<b> & 'é'", "parameters": SCHEMA}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "sunny"},
]

# Qwen 2.5's template, as published, with a shorter text around the tools.
QWEN2_5 = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# As DeepSeek's do: the arguments are joined to the text.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for call in m['tool_calls'] %}{{ call['function']['name'] + '\\n' + call['function']['arguments'] + '\\n' }}"
    "{% endfor %}{% else %}{{ m['content'] + '\\n' }}{% endif %}{% endfor %}"
)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": MESSAGES, "tools": [TOOL], **fields})


def function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "weather", **fields}}]


def rendered(source: str, body: ChatCompletionRequest) -> str:
    tools = [tool.for_template() for tool in body.offered_tools]
    return ChatTemplate(source, {}).render([message.for_template() for message in body.messages], None, tools)


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_tools_and_calls_are_rendered_as_transformers_renders_them(tools: list[dict[str, Any]]) -> None:
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    theirs, _ = render_jinja_template(
        [[MESSAGES[0], {**MESSAGES[1], "tool_calls": [call]}, MESSAGES[2]]],
        tools=tools or None,  # type: ignore[arg-type]
        chat_template=QWEN2_5,
        add_generation_prompt=True,
    )
    assert rendered(QWEN2_5, chat(tools=tools)) == theirs[0]
    assert "Zürich" in theirs[0]


def test_tools_that_may_not_be_called_are_not_shown() -> None:
    assert rendered(QWEN2_5, chat(tool_choice="none")) == rendered(QWEN2_5, chat(tools=None))
    assert "# Tools" in rendered(QWEN2_5, chat(tool_choice="auto"))


def test_a_template_that_joins_arguments_to_its_text_gets_them_as_text() -> None:
    assert rendered(TEXT_ARGUMENTS, chat(tools=None)) == 'How is it?\nweather\n{"city": "Zürich"}\nsunny\n'


@pytest.mark.parametrize("apart", [False, True])
def test_a_template_of_its_own_for_tools_is_taken_where_transformers_takes_it(tmp_path: Path, apart: bool) -> None:
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    sources = {"default": "{{ messages[0].content }}", "tool_use": QWEN2_5}
    if apart:
        (tmp_path / "chat_template.jinja").write_text(sources["default"])
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(sources["tool_use"])
    named = [{"name": name, "template": source} for name, source in sources.items()]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({} if apart else {"chat_template": named}))
    ours = ChatTemplate.load(tmp_path, Tokenizer(byte_level_tokenizer()))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours is not None
    for tools in ([], [TOOL]):
        expected = theirs.apply_chat_template(
            MESSAGES[:1], tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(MESSAGES[:1], None, tools) == expected
        assert ("# Tools" in expected) == bool(tools)
    assert ours.with_tools.source == QWEN2_5


@pytest.mark.parametrize(
    ("source", "messages", "tools", "param"),
    [
        ("{{ messages[0].content }}", MESSAGES[:1], [TOOL], "tools"),
        ("{% set tools = none %}{{ messages[0].content }}", MESSAGES[:1], [TOOL], "tools"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}", MESSAGES, [TOOL], "messages.1.tool_calls"),
        (QWEN2_5.replace('message.role == "tool"', "false"), MESSAGES, [TOOL], "messages.2.role"),
    ],
)
def test_what_a_template_would_leave_out_is_refused_by_name(
    source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        rendered(source, chat(messages=messages, tools=tools))
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_whether_a_message_is_left_out_may_depend_on_there_being_tools() -> None:
    source = "{% for m in messages if m.role != 'system' or tools %}{{ m.content }};{% endfor %}"
    messages = [{"role": "system", "content": "S"}, MESSAGES[0]]
    assert rendered(source, chat(messages=messages)) == "S;How is it?;"
    with pytest.raises(RequestError, match="leaves out a system message"):
        rendered(source, chat(messages=messages, tools=None))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "retrieval"}]),
        ("tools", [{"type": "function", "function": {}}]),
        ("tools", function(name="a b")),
        ("tools", function(name="")),
        ("tools", function(name="x" * 65)),
        ("tools", function(name="é")),
        ("tools", function(parameters=[])),
        ("tools", function(parameters="{}")),
        ("tools", function(strict=True)),
        ("tools", function(colour="red")),
        ("tools", [TOOL] * (MAX_TOOLS + 1)),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "weather"}}),
        ("tool_choice", "any"),
        ("parallel_tool_calls", "no"),
    ],
)
def test_a_bad_tool_is_refused_by_its_place(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(**{field: value})
    assert caught.value.errors()[0]["loc"][0] == field
    if value in ("required", function(strict=True)) or isinstance(value, dict):
        assert "guided decoding, which is not available yet" in caught.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"},
        {"role": "tool", "tool_call_id": "a"},
        {"role": "user", "content": "x", "tool_call_id": "a"},
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        {"role": "user", "content": "x", "reasoning_content": "y"},
        *(
            {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": arguments}}]}
            for arguments in ("[]", "{", "3", "[" * 20_000, {"a": 1}, None)
        ),
        {"role": "assistant", "tool_calls": [{**CALL, "id": 3}]},
        {"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f.g", "arguments": "{}"}}]},
    ],
)
def test_bad_messages_of_tools_are_refused_with_their_place(message: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        chat(messages=[*MESSAGES, message])
    assert caught.value.errors()[0]["loc"][:2] == ("messages", 3)


def test_what_the_template_sees_of_a_message() -> None:
    silent = {**CALL, "function": {"name": "now", "arguments": ""}}
    returned = ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": "Hm.", "tool_calls": [CALL, silent], "reasoning_content": "why"}
    ).model_dump()
    assert chat(messages=[MESSAGES[0], returned]).messages[1].for_template() == {
        "role": "assistant",
        "content": "Hm.",
        "reasoning_content": "why",
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}},
            {"id": "call00001", "type": "function", "function": {"name": "now", "arguments": {}}},
        ],
    }
    assert chat().messages[1].for_template()["content"] is None
    assert chat().messages[2].for_template() == {"role": "tool", "content": "sunny", "tool_call_id": "call00001"}
    deep: dict[str, Any] = {}
    for _ in range(300):
        deep = {"a": deep}
    assert chat(tools=function(parameters=deep)).offered_tools[0].for_template()["function"]["parameters"] == deep
    assert chat(tools=function(description=None)).offered_tools[0].for_template() == function(description=None)[0]

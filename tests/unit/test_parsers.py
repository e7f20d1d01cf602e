"""Parsers of tool calls and reasoning: one message whatever the cuts, and no character lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pdserve.config.cluster import ProxyConfig
from pdserve.errors import ConfigError
from proxy.parsers import REASONING_FORMATS, TOOL_FORMATS, reasoning_format, tool_format
from proxy.parsers.message import MessageParser
from proxy.parsers.scanner import MAX_HELD, MAX_STRING, Event

DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
DEEPSEEK_CALL = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
WEATHER, TIME = '{"city": "Zürich", "days": [1, {"a": "}]"}], "quote": "\\"\\\\"}', "{}"
CALLS = [("weather", WEATHER), ("time", TIME)]

WHOLE = {
    "hermes": "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in CALLS
    ),
    "llama3_json": "; ".join(f'{{"type": "function", "name": "{name}", "parameters": {text}}}' for name, text in CALLS),
    "mistral": "[TOOL_CALLS] ["
    + ", ".join(f'{{"name": "{name}", "arguments": {text}, "id": "a"}}' for name, text in CALLS)
    + "]",
    "deepseek_v3": DEEPSEEK.format("\n".join(DEEPSEEK_CALL.format(*call) for call in CALLS)),
}
OTHER_FORMS = [
    ("hermes", '<tool_call>{"arguments": ' + WEATHER + ', "name": "weather"}', CALLS[:1]),
    ("hermes", f'<tool_call>{{"name":"weather","parameters":{WEATHER}}}</tool_call>', CALLS[:1]),
    ("llama3_json", f'<|python_tag|>{{"name": "time", "parameters": {TIME}}}', CALLS[1:]),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]time{TIME}", CALLS),
    ("mistral", f'[TOOL_CALLS]{{"name": "time", "arguments": {TIME}}}', CALLS[1:]),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>" + DEEPSEEK_CALL.format(*CALLS[0]), CALLS[:1]),
]
PARTS = {
    "hermes": ["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {"a": [1, "}"]}}', '{"name": "f"'],
    "llama3_json": ["<|python_tag|>", '{"name": "f", "parameters": {"a": "\\""}}', "; ", '{"type": "function", '],
    "mistral": ["[TOOL_CALLS]", "[ARGS]", '[{"name": "f", "arguments": {}}', ", ", "]", "f", '{"a": {}}'],
    "deepseek_v3": [*DEEPSEEK.split("{}"), *DEEPSEEK_CALL.split("{}"), DEEPSEEK_CALL, "f", '{"a": 1}'],
}
COMMON = ["<think>", "</think>", "<", "[", "{", '"', "\\", "}", " ", "\n\n", "a", "é", ' "arguments": ', "\x1d"]


def events_of(tools: str | None, reasoning: str | None, pieces: list[str], prompt_end: str = "") -> list[Event]:
    parser = MessageParser(
        None if tools is None else TOOL_FORMATS[tools], reasoning_format(reasoning), prompt_end=prompt_end
    )
    events = [event for piece in pieces for event in parser.push(piece)] + parser.flush()
    assert parser.num_calls == sum(event.kind == "name" for event in events)
    return events


def joined(events: list[Event]) -> list[Event]:
    """Neighbours of one kind in one."""
    found: list[Event] = []
    for kind, text in events:
        if found and found[-1].kind == kind and kind != "name":
            found[-1] = Event(kind, found[-1].text + text)
        else:
            found.append(Event(kind, text))
    return found


def parts_of(tools: str | None, reasoning: str | None, text: str, prompt_end: str = "") -> list[Event]:
    """The message of `text`, which is the same however it is cut."""
    whole = joined(events_of(tools, reasoning, [text], prompt_end))
    assert joined(events_of(tools, reasoning, list(text), prompt_end)) == whole
    return whole


def called(calls: list[tuple[str, str]]) -> list[Event]:
    return [event for name, text in calls for event in (Event("name", name), Event("arguments", text))]


@pytest.mark.parametrize("name", TOOL_FORMATS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_cuts_change_nothing_and_no_character_is_lost(name: str, data: st.DataObject) -> None:
    piece = st.sampled_from([*PARTS[name], *COMMON, WHOLE[name]])
    text = "".join(data.draw(st.lists(piece, max_size=12)))
    reasoning = data.draw(st.sampled_from([None, *REASONING_FORMATS]))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    ends = sorted({0, len(text), *cuts})
    pieces = [text[start:end] for start, end in pairwise(ends)]
    whole = joined(events_of(name, reasoning, [text]))
    assert joined(events_of(name, reasoning, pieces)) == whole
    assert joined(events_of(name, reasoning, list(text))) == whole
    shown = "".join(part.text for part in whole)
    rest = iter(text)
    assert all(character in rest for character in shown), "all of it stands in the text, in its order"
    if reasoning is None and not any(part.kind == "name" for part in whole):
        assert shown == text


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=st.text(max_size=40), name=st.sampled_from(sorted(TOOL_FORMATS)))
@example(text=" \n ", name="hermes")
@example(text="a < b <tool", name="hermes")
@example(text='{"city": "Zürich"} ', name="llama3_json")
def test_an_answer_without_markup_is_content_to_the_letter(text: str, name: str) -> None:
    assert parts_of(name, "qwen3", text) == ([Event("content", text)] if text else [])


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_several_calls_are_found_with_the_models_own_arguments(name: str) -> None:
    assert parts_of(name, None, WHOLE[name]) == called(CALLS)
    assert json.loads(WEATHER)["city"] == "Zürich"


@pytest.mark.parametrize(("name", "text", "calls"), OTHER_FORMS)
def test_other_forms_of_a_call(name: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert parts_of(name, None, text) == called(calls)


@pytest.mark.parametrize("name", ["hermes", "mistral", "deepseek_v3"])
def test_content_before_a_call_ends_where_its_last_word_does(name: str) -> None:
    assert parts_of(name, None, f" I look.\n\n{WHOLE[name]}\n") == [Event("content", " I look."), *called(CALLS)]


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_arguments_come_as_they_are_written(name: str) -> None:
    events = events_of(name, None, list(WHOLE[name]))
    assert events[0] == Event("name", "weather")
    fragments = [event.text for event in events[1 : 1 + len(WEATHER)]]
    assert fragments == list(WEATHER), "each character alone"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>no</tool_call>"),
        ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "f", "arguments"'),
        ("hermes", '<tool_call>{"name": "\\x", "arguments": {}}</tool_call>'),
        ("llama3_json", '{"name": "Bob", "age": 3}'),
        ("llama3_json", "<|python_tag|>print(1)"),
        ("llama3_json", 'Sure: {"name": "f", "parameters": {}}'),
        ("mistral", "[TOOL_CALLS] none, as I said"),
        ("mistral", "[TOOL_CALLS] []"),
        ("deepseek_v3", DEEPSEEK.format("")[:-1]),
        ("deepseek_v3", DEEPSEEK.format(DEEPSEEK_CALL.format("f", "[]"))),
    ],
)
def test_what_is_no_call_comes_back_as_content(name: str, text: str) -> None:
    assert parts_of(name, None, text) == [Event("content", text)]


def test_a_call_stands_though_what_follows_it_is_malformed_or_missing() -> None:
    begin = '<tool_call>{"name": "f", "arguments": '
    assert parts_of("hermes", None, begin + '{"a": [1') == called([("f", '{"a": [1')])
    assert parts_of("hermes", None, begin + '{"a": 1}, oops') == [
        *called([("f", '{"a": 1}')]),
        Event("content", ", oops"),
    ]
    bad_then_good = f"<tool_call>{{'f'}}</tool_call>{WHOLE['hermes']}"
    assert parts_of("hermes", None, bad_then_good) == [
        Event("content", "<tool_call>{'f'}</tool_call>"),
        *called(CALLS),
    ]


def test_what_is_held_is_bounded() -> None:
    def longest_wait(text: str) -> int:
        parser, waited, longest = MessageParser(TOOL_FORMATS["hermes"], None), 0, 0
        for character in text:
            waited = 0 if parser.push(character) else waited + 1
            longest = max(longest, waited)
        return longest

    assert longest_wait('<tool_call>{"name": "' + "x" * 2000) <= MAX_STRING + 32
    assert longest_wait("a" + " " * 5000) <= 1100
    late = '<tool_call>{"arguments": {"a": "' + "x" * (MAX_HELD + 100) + '"}, "name": "f"}</tool_call>'
    assert parts_of("hermes", None, late) == [Event("content", late)]
    assert parts_of("hermes", None, "a" + " " * 3000 + WHOLE["hermes"])[0] == Event("content", "a" + " " * 3000)
    assert parts_of("hermes", None, late.replace("x" * 200, ""))[0] == Event("name", "f")


@pytest.mark.parametrize(
    ("name", "prompt_end", "text", "reasoning", "content"),
    [
        ("qwen3", "", "<think>\nHm.\n</think>\n\nYes.\n", "Hm.", "Yes.\n"),
        ("qwen3", "", "Yes.", "", "Yes."),
        ("qwen3", "", "a <think>b</think>", "", "a <think>b</think>"),
        ("qwen3", "assistant\n<think>\n", "Hm.\n</think>\n\nYes.", "Hm.", "Yes."),
        ("qwen3", "<think>\n\n</think>\n\n", "Yes.", "", "Yes."),
        ("deepseek_r1", "", "Hm. </think>Yes.", "Hm.", "Yes."),
        ("deepseek_r1", "", "<think>Hm.</think>Yes.</think>", "Hm.", "Yes.</think>"),
        ("deepseek_r1", "</think>", "Yes.", "", "Yes."),
        ("deepseek_r1", "", "Hm. </thi", "Hm. </thi", ""),
        ("qwen3", "", "<think></think>Yes.", "", "Yes."),
    ],
)
def test_reasoning_is_told_from_content(name: str, prompt_end: str, text: str, reasoning: str, content: str) -> None:
    expected = [Event("reasoning", reasoning)] * bool(reasoning) + [Event("content", content)] * bool(content)
    assert parts_of(None, name, text, prompt_end) == expected


def test_a_call_behind_reasoning_is_found_and_one_inside_is_not() -> None:
    text = f"<think>\n{WHOLE['hermes']}\n</think>\n\n{WHOLE['hermes']}"
    assert parts_of("hermes", "qwen3", text) == [Event("reasoning", WHOLE["hermes"]), *called(CALLS)]
    answer = f"<think>Hm.</think>\n\n{WHOLE['llama3_json']}"
    assert parts_of("llama3_json", "qwen3", answer) == [Event("reasoning", "Hm."), *called(CALLS)]


def test_all_formats_can_be_configured() -> None:
    def allowed(key: str) -> set[Any]:
        literal, _ = get_args(ProxyConfig.model_fields[key].annotation)
        return set(get_args(literal))

    assert allowed("tool_parser") == {"auto", *TOOL_FORMATS}
    assert allowed("reasoning_parser") == set(REASONING_FORMATS)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("<tool_call>\n{{ tool_call | tojson }}\n</tool_call>", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("'<｜tool▁calls▁begin｜>' + '```json'", "deepseek_v3"),
        ("""{{- 'ipython' }}{{- '{"name": "' + call.name + '", ' }}{{- '"parameters": ' }}""", "llama3_json"),
        ("""{{- 'ipython' }}{{- '<tool_call>{"name": "' + call.name + '", "arguments": ' }}""", "hermes"),
        ("<tool_call>\n<function={{ name }}>", None),
        ("'<｜tool▁calls▁begin｜>'", None),
        ("[TOOL_CALLS] <tool_call>", None),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_a_template_tells_the_format_or_the_start_fails(template: str | None, name: str | None) -> None:
    if name is not None:
        assert tool_format("auto", template) is TOOL_FORMATS[name]
        return
    with pytest.raises(ConfigError, match=r"proxy\.tool_parser: auto") as caught:
        tool_format("auto", template)
    assert caught.value.param == "proxy.tool_parser"
    assert tool_format(None, template) is None
    assert tool_format("hermes", template) is TOOL_FORMATS["hermes"]

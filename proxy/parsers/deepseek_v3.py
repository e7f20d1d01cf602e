"""Calls of DeepSeek V3 and R1: between two markers, each with a marker of its own, its name, and JSON in a fence."""

from __future__ import annotations

from proxy.parsers.calls import ToolFormat, begin_call
from proxy.parsers.scanner import Scanner, Wait

_ALL, _ALL_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_ONE, _ONE_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_NAME = "<｜tool▁sep｜>"
_FENCE, _FENCE_END = "```json", "```"


def _read(text: Scanner) -> Wait[None]:
    while (yield from text.find(_ALL)):
        with text.or_content():
            yield from text.space()
            yield from text.expect(_ONE)
            yield from _read_one(text)
            while (yield from text.accept(_ONE)):
                yield from _read_one(text)
            if (yield from text.peek()):  # a model may end without the last marker
                yield from text.expect(_ALL_END)
            text.drop()


def _read_one(text: Scanner) -> Wait[None]:
    yield from text.expect("function")
    yield from text.expect(_NAME)
    name = yield from text.name()
    yield from text.space()
    yield from text.expect(_FENCE)
    yield from text.space()
    if (yield from text.peek()) == "{":
        begin_call(text, name)
    yield from text.json_object("arguments")
    yield from text.space()
    yield from text.expect(_FENCE_END)
    yield from text.space()
    yield from text.expect(_ONE_END)
    yield from text.space()
    text.drop()


def _fits(template: str) -> bool:
    """V3.1 has the same markers without a fence."""
    return _ALL in template and _FENCE in template


FORMAT = ToolFormat((_ALL, _ALL_END, _ONE, _ONE_END, _NAME), _fits, _read)

"""Calls of Mistral's models behind `[TOOL_CALLS]`: a JSON list of calls, or `NAME[ARGS]{...}` (newer models).

Newer models write the marker before each call; some leave out `[ARGS]`.
"""

from __future__ import annotations

from proxy.parsers.calls import ToolFormat, begin_call, read_call
from proxy.parsers.scanner import Scanner, Wait

_BEGIN, _ARGUMENTS = "[TOOL_CALLS]", "[ARGS]"


def _read(text: Scanner) -> Wait[None]:
    while (yield from text.find(_BEGIN)):
        with text.or_content():
            yield from text.space()
            if (yield from text.accept("[")):
                yield from _read_list(text)
            elif (yield from text.peek()) == "{":
                yield from read_call(text)
            else:
                yield from _read_named(text)


def _read_list(text: Scanner) -> Wait[None]:
    while True:
        yield from text.space()
        yield from read_call(text)
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    yield from text.expect("]")
    text.drop()


def _read_named(text: Scanner) -> Wait[None]:
    name = yield from text.name()
    yield from text.accept(_ARGUMENTS)
    yield from text.space()
    if (yield from text.peek()) == "{":
        begin_call(text, name)
    yield from text.json_object("arguments")


def _fits(template: str) -> bool:
    return _BEGIN in template


FORMAT = ToolFormat((_BEGIN, _ARGUMENTS), _fits, _read)

"""Calls of Hermes and Qwen models: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, any number of them."""

from __future__ import annotations

from proxy.parsers.calls import ToolFormat, read_call
from proxy.parsers.scanner import Scanner, Wait

_BEGIN, _END = "<tool_call>", "</tool_call>"


def _read(text: Scanner) -> Wait[None]:
    while (yield from text.find(_BEGIN)):
        with text.or_content():
            yield from text.space()
            yield from read_call(text)
            yield from text.space()
            if (yield from text.peek()):  # a model may end without the closing tag
                yield from text.expect(_END)
            text.drop()


def _fits(template: str) -> bool:
    """Other models write XML or parameters of their own between the same tags."""
    return _BEGIN in template and not any(each in template for each in ("<function=", "<arg_key>", "<parameter="))


FORMAT = ToolFormat((_BEGIN, _END), _fits, _read)

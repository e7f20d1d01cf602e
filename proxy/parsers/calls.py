"""What formats of tool calls have in common: how one is described, and the JSON object that most of them use."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from proxy.parsers.scanner import Event, Malformed, Scanner, Wait

FUNCTION_NAME: Final = r"^[a-zA-Z0-9_-]{1,64}$"
"""OpenAI's rule."""

_NAME = re.compile(FUNCTION_NAME)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How one family of models writes calls.

    Attributes:
        markers: texts that may be special tokens of a tokenizer; they are then shown to the reader.
        fits: whether a chat template, by its source, writes calls in this format.
        read: reads a whole answer.
    """

    markers: tuple[str, ...]
    fits: Callable[[str], bool]
    read: Callable[[Scanner], Wait[None]]


def begin_call(text: Scanner, name: str) -> None:
    """The call of `name` is certain; what is held was markup. Raises Malformed for what can be no function's name."""
    if not _NAME.fullmatch(name):
        raise Malformed
    text.drop()
    text.events.append(Event("name", name))


def read_call(text: Scanner) -> Wait[None]:
    """`{"name": ..., "arguments": {...}}`, in either order; also with `parameters`, `type` and `id`.

    Raises:
        Malformed: it is something else. Where the call was certain before that, it stands, and the rest is held.
    """
    name: str | None = None
    arguments: str | None = None
    is_certain = False
    yield from text.expect("{")
    while True:
        key = yield from _read_key(text)
        if key == "name" and name is None:
            name = yield from text.json_string()
            if arguments is not None:
                begin_call(text, name)
                text.events.append(Event("arguments", arguments))
                is_certain = True
        elif key in ("arguments", "parameters") and arguments is None:
            begin = len(text.held)
            if name is None:
                yield from text.json_object()
                arguments = text.held[begin:]
            else:
                arguments = ""
                if (yield from text.peek()) != "{":
                    raise Malformed
                begin_call(text, name)
                yield from text.json_object("arguments")
                is_certain = True
        elif key in ("type", "id"):
            yield from text.json_string()
        else:
            raise Malformed
        yield from text.space()
        if not (yield from text.accept(",")):
            break
    yield from text.expect("}")
    if not is_certain:
        raise Malformed
    text.drop()


def _read_key(text: Scanner) -> Wait[str]:
    yield from text.space()
    key = yield from text.json_string()
    yield from text.space()
    yield from text.expect(":")
    yield from text.space()
    return key

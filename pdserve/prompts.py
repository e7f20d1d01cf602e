"""What the Python API takes for a prompt: the forms that TensorRT-LLM's users know.

Text, or a list of token ids, or a dict with either of them; and a list of such prompts, which may be mixed.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeGuard

import msgspec

from pdserve.errors import RequestError

_ALLOWED = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": token ids}'
_KEYS = ("prompt", "prompt_token_ids")


class TextPrompt(TypedDict):
    prompt: str


class TokensPrompt(TypedDict):
    prompt_token_ids: Sequence[int]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


class ParsedPrompt(NamedTuple):
    """At least one of the two is there; the token ids count, and the text is what they came from."""

    text: str | None
    token_ids: list[int] | None


def is_one_prompt(inputs: Any) -> TypeGuard[Prompt]:
    """Whether `inputs` is a single prompt, rather than a list of them."""
    return not _is_list(inputs) or (len(inputs) > 0 and isinstance(inputs[0], int))


def parse_prompt(prompt: Any, where: str = "inputs") -> ParsedPrompt:
    """`prompt` in whichever form. Raises RequestError that names `where` and says what is allowed."""
    if isinstance(prompt, str):
        return ParsedPrompt(_text(prompt, where), None)
    if _is_list(prompt):
        return ParsedPrompt(None, _token_ids(prompt, where))
    if not isinstance(prompt, Mapping):
        raise RequestError(f"{where}: expected {_ALLOWED}, got {reprlib.repr(prompt)}", where)
    given = {key: value for key, value in prompt.items() if value is not None}
    unknown = [key for key in given if key not in _KEYS]
    if unknown or not given:
        what = f"{unknown[0]!r} is unknown" if unknown else "it has neither"
        raise RequestError(f"{where}: expected {_ALLOWED}; {what}", where)
    text, token_ids = (given.get(key) for key in _KEYS)
    if not (text is None or isinstance(text, str)):
        raise RequestError(f"{where}.prompt: expected text, got {reprlib.repr(text)}", where)
    if not (token_ids is None or _is_list(token_ids)):
        raise RequestError(f"{where}.prompt_token_ids: expected token ids, got {reprlib.repr(token_ids)}", where)
    return ParsedPrompt(
        None if text is None else _text(text, f"{where}.prompt"),
        None if token_ids is None else _token_ids(token_ids, f"{where}.prompt_token_ids"),
    )


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def _text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where}: character {error.start} is not valid Unicode", where) from None
    return text


def _token_ids(values: Sequence[Any], where: str) -> list[int]:
    """A copy of `values`; whether they are in the vocabulary is the engine's to say."""
    if not values:
        raise RequestError(f"{where}: the prompt is empty", where)
    token_ids = list(values)
    try:
        return msgspec.convert(token_ids, list[int])
    except msgspec.ValidationError:
        at, wrong = next((at, each) for at, each in enumerate(token_ids) if type(each) is not int)
        raise RequestError(f"{where}[{at}]: expected a token id, got {reprlib.repr(wrong)}", where) from None

"""Chat templates: Jinja as Hugging Face models use it, in a sandbox.

The environment has what templates expect there: `raise_exception`, `strftime_now`, `tojson` without HTML escapes,
loop controls, block trimming, `{% generation %}` blocks, and the model's special tokens by name.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812 - a class in lower case
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import ConfigError, RequestError

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_RENDERING_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template can raise over messages it was not written for."""


class ChatTemplate:
    """One model's template.

    Args:
        source: Jinja.
        special_tokens: names such as `bos_token` and their text.

    Raises:
        ConfigError: the template is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}", "model") from None
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model folder (`chat_template.jinja`, else the one in `tokenizer_config.json`)."""
        settings = _read_settings(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else _embedded(settings.get("chat_template"))
        return None if source is None else cls(source, _special_tokens(settings))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            RequestError: the template refuses these messages.
        """
        names = {**self._special_tokens, "add_generation_prompt": True, **(variables or {})}
        try:
            return self._template.render({**names, "messages": messages})
        except _RENDERING_ERRORS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from None


class _GenerationBlock(Extension):
    """`{% generation %}`, which marks assistant text for training and changes nothing here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, LoopControls]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", "tokenizer") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: a JSON object was expected", "tokenizer")
    return settings


def _embedded(template: Any) -> str | None:
    """A template, or a list of named ones of which "default" counts."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _SPECIAL_TOKENS:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found

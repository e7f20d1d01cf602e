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
from pdserve.text.tokenizer import Tokenizer
from proxy.template_files import read_special_tokens, read_template
from proxy.template_roles import TemplateRoles

_NOTHING = {"tools": None, "documents": None}
"""Some templates ask whether these are none, as they are in transformers, and not whether they are there."""

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
        self._roles = TemplateRoles(self._render)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a model folder (see `template_files`), None if it has none. Raises ConfigError."""
        source = read_template(folder)
        return None if source is None else cls(source, read_special_tokens(folder, tokenizer.special_text))

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that asks for the assistant's next message.

        Raises:
            RequestError: the template refuses these messages, or leaves one of them out.
        """
        known = variables or {}
        roles = self._roles.roles(tuple(message["role"] for message in messages), known)
        return self._render([{**each, "role": role} for each, role in zip(messages, roles, strict=True)], known)

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        names = {**_NOTHING, **self._special_tokens, "add_generation_prompt": True, **variables}
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

"""Chat templates: Jinja as Hugging Face models use it, in a sandbox.

The environment has what templates expect there: `raise_exception`, `strftime_now`, `tojson` without HTML escapes,
loop controls, block trimming, `{% generation %}` blocks, and the model's special tokens by name.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812 - a class in lower case
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pdserve.errors import ConfigError, RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.template_files import read_special_tokens, read_template
from proxy.template_roles import TemplateRoles

_ANY_TOOL = {
    "type": "function",
    "function": {"name": "any", "description": "any", "parameters": {"type": "object", "properties": {}}},
}
"""Stands for a request's tools where only roles matter."""

_NOTHING = {"tools": None, "documents": None}
"""Some templates ask whether these are none, as they are in transformers, and not whether they are there."""

_RENDERING_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What a template can raise over messages it was not written for."""


class ChatTemplate:
    """One model's template.

    Args:
        source: Jinja.
        special_tokens: names such as `bos_token` and their text.
        for_tools: the template for requests with tools, if that is another.

    Raises:
        ConfigError: the template is not Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], for_tools: str | None = None) -> None:
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self._knows_tools = "tools" in meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ConfigError(f"the chat template is not valid: {error}", "model") from None
        self.source = source
        self.with_tools = self if for_tools is None else ChatTemplate(for_tools, special_tokens)
        self._special_tokens = dict(special_tokens)
        self._roles = TemplateRoles(self._render)

    @classmethod
    def load(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a model folder (see `template_files`), None if it has none. Raises ConfigError."""
        source, for_tools = read_template(folder)
        return None if source is None else cls(source, read_special_tokens(folder, tokenizer.special_text), for_tools)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> str:
        """The prompt that asks for the assistant's next message.

        Args:
            messages: calls in `tool_calls` have their arguments as an object.
            tools: what the model may call, as OpenAI's API describes it.

        Raises:
            RequestError: the template refuses these messages, or leaves one of them, its calls or the tools out.
        """
        if tools and self.with_tools is not self:
            return self.with_tools.render(messages, variables, tools)
        if tools and not self._knows_tools:
            raise RequestError("tools: the chat template of this model has no place for tools", "tools")
        known = dict(variables or {})
        roles = self._roles.roles(tuple(message["role"] for message in messages), known | _tools_of([_ANY_TOOL], tools))
        shown = [{**each, "role": role} for each, role in zip(messages, roles, strict=True)]
        return self._render(self._with_calls(shown), known | _tools_of(tools, tools))

    def _with_calls(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`messages` with the arguments of their calls in the form that the template takes."""
        for index, message in enumerate(messages):
            if not message.get("tool_calls"):
                continue
            if "tool_calls" not in self.source:
                param = f"messages.{index}.tool_calls"
                raise RequestError(f"{param}: the chat template of this model leaves out tool calls", param)
            if self._takes_text_arguments:
                message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return messages

    @functools.cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether the template joins a call's arguments to its text, as DeepSeek's do; others write an object."""

        def is_refused(arguments: Any) -> bool:
            call = {"type": "function", "id": "any000000", "function": {"name": "any", "arguments": arguments}}
            asked = {"role": "user", "content": "any"}
            try:
                self._render([asked, {"role": "assistant", "content": None, "tool_calls": [call]}], {})
            except RequestError:
                return True
            return False

        return is_refused({"any": 1}) and not is_refused('{"any": 1}')

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        names = {**_NOTHING, **self._special_tokens, "add_generation_prompt": True, **variables}
        try:
            return self._template.render({**names, "messages": messages})
        except _RENDERING_ERRORS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", "messages") from None


def _tools_of(tools: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The template's variable for `tools`, if any were asked for."""
    return {"tools": tools} if asked else {}


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _to_json(function["arguments"])}}


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

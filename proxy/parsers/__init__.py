"""Tool calls and reasoning in the text of an answer: a file for each format, and these registries of them.

A format of tool calls is added as `proxy/parsers/NAME.py`, a line in `TOOL_FORMATS`, and its name among the values that
the configuration allows for `proxy.tool_parser`; one of reasoning as a line in `REASONING_FORMATS`, with its name among
those of `proxy.reasoning_parser`.
"""

from __future__ import annotations

from pdserve.errors import ConfigError
from proxy.parsers import deepseek_v3, hermes, llama3_json, mistral
from proxy.parsers.calls import ToolFormat
from proxy.parsers.reasoning import ReasoningFormat

TOOL_FORMATS: dict[str, ToolFormat] = {
    "deepseek_v3": deepseek_v3.FORMAT,
    "hermes": hermes.FORMAT,
    "llama3_json": llama3_json.FORMAT,
    "mistral": mistral.FORMAT,
}

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": ReasoningFormat("<think>", "</think>", is_open=True),
    "qwen3": ReasoningFormat("<think>", "</think>", is_open=False),
}


def tool_format(name: str | None, template: str | None) -> ToolFormat | None:
    """The format that the configuration names.

    Args:
        name: of the format; "auto" finds it by the chat template.
        template: the model's, its source.

    Raises:
        ConfigError: the template does not tell the format, or tells several.
    """
    if name != "auto":
        return None if name is None else TOOL_FORMATS[name]
    found = [each for each, known in TOOL_FORMATS.items() if template is not None and known.fits(template)]
    if len(found) != 1:
        raise ConfigError(
            f"proxy.tool_parser: auto: the chat template is of {', '.join(found) or 'no format that is known'}; "
            f"allowed besides: {', '.join(TOOL_FORMATS)} or null",
            "proxy.tool_parser",
        )
    return TOOL_FORMATS[found[0]]


def reasoning_format(name: str | None) -> ReasoningFormat | None:
    """The format that the configuration names."""
    return None if name is None else REASONING_FORMATS[name]

"""Where a model's folder keeps its chat template and special tokens, in the order in which transformers looks.

Template: `chat_template.jinja`, then `tokenizer_config.json` (one, or a list of named ones of which "default" counts),
then `chat_template.json`. Of the named ones, "tool_use" is for requests with tools; beside `chat_template.jinja` it is
`additional_chat_templates/tool_use.jinja`. Special tokens: `tokenizer_config.json`; over it `special_tokens_map.json`,
unless the former lists its added tokens; and for the first and last token what `config.json` says, where no file says a
word.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

_FROM_CONFIG = ("bos_token", "eos_token")


def read_template(folder: Path) -> tuple[str | None, str | None]:
    """The source of the template, and of the one for requests with tools where that is another; None for what the
    folder does not have. Raises ConfigError for a file that can't be read."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        further = folder / "additional_chat_templates" / "tool_use.jinja"
        return _read_text(file), _read_text(further) if further.is_file() else None
    for name in ("tokenizer_config.json", "chat_template.json"):
        default, for_tools = _sources(_read_object(folder / name).get("chat_template"), folder / name)
        if default is not None:
            return default, for_tools
    return None, None


def read_special_tokens(folder: Path, text_of: Callable[[int], str | None]) -> dict[str, str]:
    """The text of `bos_token`, `eos_token` and every other token that has a name.

    Args:
        text_of: the text of a special token by its id, None if the id has none.

    Raises:
        ConfigError: a file can't be read.
    """
    settings = _read_object(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= _read_object(folder / "special_tokens_map.json")
    extra = settings.get("extra_special_tokens")
    named = {**settings, **(extra if isinstance(extra, dict) else {})}
    found = {name: text for name, value in named.items() if name.endswith("_token") and (text := _text(value))}
    config = _read_object(folder / "config.json")
    for name in _FROM_CONFIG:
        text = text_of_first(config.get(f"{name}_id"), text_of)
        if name not in settings and text is not None:
            found[name] = text
    return found


def text_of_first(ids: Any, text_of: Callable[[int], str | None]) -> str | None:
    """The text of a token id, or of the first of several."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    return text_of(first) if isinstance(first, int) else None


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _sources(template: Any, file: Path) -> tuple[str | None, str | None]:
    for_tools = None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            listed = ", ".join(map(str, named))
            raise ConfigError(f"{file}: of the chat templates {listed} none is named default", "model")
        template, for_tools = named["default"], named.get("tool_use")
    return template if isinstance(template, str) else None, for_tools if isinstance(for_tools, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} can't be read: {error}", "model") from None


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(_read_text(file))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}", "tokenizer") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file}: a JSON object was expected", "tokenizer")
    return settings

"""From files, environment and flags to a `ClusterConfig`.

Later sources win: defaults, then YAML files in order, then `PDSERVE_` environment variables (`__` between levels),
then command-line overrides (`context_servers.num_instances=2`). Anything unknown or not allowed raises
`ConfigError` with the key's full path and what was allowed.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from pdserve.config.cluster import ClusterConfig, merge
from pdserve.config.environment import settings
from pdserve.config.mistakes import explain
from pdserve.config.schema import all_keys, annotation_at, is_list, is_switch, is_text
from pdserve.config.yaml_text import parse, read_file
from pdserve.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)

STANDARD_INPUT = Path("-")


def load(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> ClusterConfig:
    """The effective configuration.

    Args:
        files: YAML files, merged in order; `-` is standard input.
        overrides: `dotted.key=value` strings.
        environ: variables named `PDSERVE_KEY__SUBKEY` are read.
        beneath: lies under the files, over the defaults.

    The value of an override or variable is YAML, but text is taken as it is, and a list may go without brackets.

    Raises:
        ConfigError: with one line for each key at fault.
        HostError: a file can't be read for want of something.
    """
    data = dict(beneath or {})
    for file in files:
        stream = sys.stdin.buffer if file == STANDARD_INPUT else None
        data = merge(data, read_file(file, stream, ClusterConfig))
    for path, text in settings(environ or {}, ClusterConfig):
        data = merge(data, _at(path, text))
    for override in overrides:
        data = merge(data, _parse_override(override))
    return validated(ClusterConfig, data)


def validated(model: type[Model], data: Any) -> Model:
    """`data` as a `model`. Raises ConfigError with one line for each key at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model) from None


def overrides_of(flags: Sequence[str]) -> list[str]:
    """`--a.b=c`, `--a.b c` and, for a switch, `--a.b` as `a.b=c`.

    Raises:
        ConfigError: something else stands there, or a value is missing.
    """
    overrides: list[str] = []
    rest = deque(flags)
    while rest:
        flag = rest.popleft()
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"{flag!r}: expected --dotted.key=value")
        key = flag[2:]
        if "=" in key:
            overrides.append(key)
        elif rest and not rest[0].startswith("--"):
            overrides.append(f"{key}={rest.popleft()}")
        elif is_switch(annotation_at(ClusterConfig, key.split("."))):
            overrides.append(f"{key}=true")
        else:
            raise ConfigError(f"{flag}: a value is missing", key)
    return overrides


def list_keys() -> str:
    """Every key of a `ClusterConfig` with its default, a line each."""
    return "\n".join(f"  {'.'.join(path)}: {_shown(default)}" for path, default in all_keys(ClusterConfig))


def _shown(default: Any) -> str:
    return "(required)" if default is PydanticUndefined else json.dumps(default, default=str)


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected --dotted.key=value", key)
    return _at(tuple(key.split(".")), text)


def _at(path: tuple[str, ...], text: str) -> dict[str, Any]:
    """The data in which the key at `path` has the value that `text` means."""
    value = _value(text, annotation_at(ClusterConfig, path), ".".join(path))
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _value(text: str, annotation: Any, name: str) -> Any:
    if text == "null":
        return None
    if is_text(annotation) and not text.startswith(('"', "'")):
        return text
    if is_list(annotation) and not text.startswith("["):
        text = f"[{text}]"
    return parse(text, annotation, name)

"""From files, environment and flags to a `ClusterConfig`.

Later sources win: defaults, then YAML files in order, then `PDSERVE_` environment variables (`__` between levels),
then command-line overrides (`context_servers.num_instances=2`). Anything unknown or not allowed raises
`ConfigError` with the key's full path and what was allowed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

from pdserve.config.cluster import ClusterConfig, merge
from pdserve.errors import ConfigError

_PASSWORD_IN_URI = re.compile(r"(?<=://)([^:/@]+):[^@/]+@")


class _StrictLoader(yaml.SafeLoader):
    """YAML in which writing a key twice is an error instead of a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                line = key_node.start_mark.line + 1
                raise ConfigError(f"{self.name}, line {line}: the key {key!r} is given twice", str(key))
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Environment(BaseSettings, ClusterConfig):
    """The fields of `ClusterConfig`, read from the environment by pydantic-settings."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def load(
    files: Sequence[Path] = (),
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> ClusterConfig:
    """The effective configuration.

    Args:
        files: YAML files, merged in order.
        overrides: `dotted.key=value` strings; the value is read as YAML.
        environ: ignored when empty; variables named `PDSERVE_KEY__SUBKEY`.
        beneath: lies under the files, over the defaults.

    Raises:
        ConfigError: with one line for each key at fault.
    """
    data = dict(beneath or {})
    for file in files:
        data = merge(data, _read(file))
    data = merge(data, _from_environment(environ or {}))
    for override in overrides:
        data = merge(data, _parse_override(override))
    try:
        return ClusterConfig.model_validate(data)
    except ValidationError as error:
        details = _without_inherited(error.errors())
        raise ConfigError("; ".join(_explain(detail) for detail in details), _path(details[0])) from None


def masked(config: BaseModel) -> dict[str, Any]:
    """`config` as plain data with passwords hidden, fit to print."""
    return {key: _mask(value) for key, value in config.model_dump(mode="json").items()}


def _read(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            data = yaml.load(stream, _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a mapping of keys was expected, not a {type(data).__name__}")
    return data


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    source = EnvSettingsSource(
        _Environment, env_prefix="PDSERVE_", env_nested_delimiter="__", env_parse_none_str="null"
    )
    source.env_vars = {key.lower(): value for key, value in environ.items()}
    return source()


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected --dotted.key=value", key)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _without_inherited(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out a pool's error that is the top level's own, passed down."""
    top = {(detail["loc"], detail["type"]) for detail in details}
    pools = ("context_servers", "generation_servers")
    return [d for d in details if d["loc"][:1] not in [(p,) for p in pools] or (d["loc"][1:], d["type"]) not in top]


def _path(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _explain(detail: ErrorDetails) -> str:
    path = _path(detail)
    if detail["type"] == "extra_forbidden":
        allowed = _keys_beside(detail["loc"])
        near = difflib.get_close_matches(str(detail["loc"][-1]), allowed, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"{path}: unknown key; {hint}allowed: {', '.join(allowed)}"
    if detail["type"] == "missing":
        return f"{path}: required"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{path}: {message}, got {_mask(detail['input'])!r}" if path else message


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = ClusterConfig
    for part in location[:-1]:
        annotation = model.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
    return sorted(model.model_fields)


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mask(inner) for key, inner in value.items()}
    return _PASSWORD_IN_URI.sub(r"\1:***@", value) if isinstance(value, str) else value

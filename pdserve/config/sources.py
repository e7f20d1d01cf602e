"""Files, variables and flags as sources of pydantic-settings, which lays them over each other.

pydantic-settings makes a flag of each key with its type, default and description, nests dotted flags and variables with
`__`, and merges. Ours is what a value may look like (`yaml_text`), which names are keys (`environment`, `mistakes`) and
in what the flags differ (`_add_flag`). Why: docs/adr/0026-sources-of-the-configuration.md.
"""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings.sources.utils import parse_env_vars

from pdserve.config.cluster import ClusterConfig
from pdserve.config.environment import PREFIX
from pdserve.config.llm_args import LlmArgs
from pdserve.config.mistakes import POOLS
from pdserve.config.schema import annotation_at, field_at, is_switch, section_of
from pdserve.config.yaml_text import as_json
from pdserve.errors import ConfigError

_NULL = "null"
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


class _Keys(ClusterConfig, BaseSettings):
    """Tells the sources which keys there are. None is ever made, so its validator is never built."""

    model_config = SettingsConfigDict(defer_build=True, case_sensitive=True)


class _Merged(BaseSettings):
    """What all sources say together, not validated."""

    model_config = SettingsConfigDict(extra="allow", case_sensitive=True)


def merged(sources: Sequence[PydanticBaseSettingsSource]) -> dict[str, Any]:
    """The data of all `sources`: mappings merge, and of all else the first source's counts."""
    built = _Merged(_build_sources=(tuple(sources), {}))  # type: ignore[call-arg]  # without its plugin, mypy sees no more
    return built.model_extra or {}


def from_data(data: Mapping[str, Any]) -> PydanticBaseSettingsSource:
    """The source of data that is read already, such as a file's."""
    return InitSettingsSource(_Merged, dict(data))


def from_variables(texts: Mapping[str, str]) -> PydanticBaseSettingsSource:
    """The source of environment variables, as `environment.settings` gives them."""
    source = EnvSettingsSource(
        _Keys, case_sensitive=True, env_prefix=PREFIX.lower(), env_nested_delimiter="__", env_parse_none_str=_NULL
    )
    source.env_vars = parse_env_vars(texts, case_sensitive=True, parse_none_str=_NULL)
    return source


def from_flags(flags: Sequence[str]) -> list[PydanticBaseSettingsSource]:
    """The sources of `--a.b=c`, `--a.b c` and, for a switch, `--a.b`.

    Flags that name no key are data, too, so that they are refused along with whatever else is wrong.

    Raises:
        ConfigError: something else stands there, or a value is missing.
    """
    parser, source = _parser()
    unknown = [key for key in map(_key, flags) if key and field_at(ClusterConfig, key.split(".")) is None]
    for key in dict.fromkeys(unknown):
        parser.add_argument(f"--{key}", dest=SUPPRESS, nargs="?")
    try:
        given, rest = parser.parse_known_args(_joined(flags))
    except ArgumentError as error:
        flag = error.argument_name or ""
        raise ConfigError(f"{flag}: a value is missing", flag.removeprefix("--")) from None
    if rest:
        raise ConfigError(f"{rest[0]!r}: expected --dotted.key=value")
    texts = {
        name: as_json(text, annotation_at(ClusterConfig, name.split(".")), name)
        for name, text in sorted(vars(given).items())  # sections before what is in them
    }
    return [*(from_data(_nested(key.split("."))) for key in unknown), source(parsed_args=texts)]


def help_of_keys() -> str:
    """Every key as a flag, with its type, description, default and bounds, section by section."""
    return _parser()[0].format_help()


def _parser() -> tuple[ArgumentParser, CliSettingsSource[ArgumentParser]]:
    parser = ArgumentParser(usage=SUPPRESS, add_help=False, allow_abbrev=False, exit_on_error=False)
    source = CliSettingsSource[ArgumentParser](
        _Keys,
        root_parser=parser,
        add_argument_method=_add_flag,
        add_argument_group_method=_add_section,
        cli_parse_none_str=_NULL,
        cli_use_class_docs_for_groups=True,
    )
    return parser, source


def _add_section(parser: ArgumentParser, title: str, description: str | None) -> Any:
    return parser.add_argument_group(title, None if _is_inherited(title.partition(" ")[0]) else description)


def _add_flag(group: Any, *names: str, dest: str = "", **options: Any) -> None:
    """Add a flag as pydantic-settings has it, but: a switch may do without value, a list comes in one flag, a section
    only with a value; bounds are told, and of what pools inherit no more than name and type."""
    field = field_at(ClusterConfig, dest.split("."))
    if field is None:  # --help, which the command has itself
        return
    options.pop("action", None)
    options["nargs"], options["const"] = ("?", "true") if is_switch(field.annotation) else (None, None)
    if section_of(field.annotation) is not None:
        options["metavar"], options["help"] = "YAML", "the whole section"
    bounds = [
        f"{sign} {getattr(each, name)}"
        for each in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(each, name)
    ]
    if bounds:
        options["help"] += f" [{', '.join(bounds)}]"
    if _is_inherited(dest):
        options["help"] = None
    group.add_argument(*names, dest=dest, **options)


def _is_inherited(key: str) -> bool:
    """Whether it is a pool's key that is by default as at the top level."""
    pool, _, below = key.partition(".")
    return pool in POOLS and below.partition(".")[0] in LlmArgs.model_fields


def _nested(path: Sequence[str]) -> dict[str, Any]:
    return {path[0]: _nested(path[1:])} if path else {}


def _key(flag: str) -> str:
    """What `--a.b` or `--a.b=c` names; "" for anything else."""
    return flag.partition("=")[0].removeprefix("--") if flag.startswith("--") else ""


def _joined(flags: Sequence[str]) -> list[str]:
    """`--key -value` as `--key=-value`: argparse takes nothing that begins with a dash for a value."""
    joined: list[str] = []
    for flag in flags:
        if flag.startswith("-") and not _key(flag) and joined and _key(joined[-1]) and "=" not in joined[-1]:
            joined[-1] += f"={flag}"
        else:
            joined.append(flag)
    return joined

"""From files, environment and flags to a `ClusterConfig`.

Later sources win: defaults, then YAML files in order, then `PDSERVE_` environment variables (`__` between levels),
then command-line flags (`--context_servers.num_instances=2`). Anything unknown or not allowed raises `ConfigError` with
the key's full path and what was allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pdserve.config.cluster import ClusterConfig
from pdserve.config.environment import settings
from pdserve.config.mistakes import explain
from pdserve.config.yaml_text import read_file

Model = TypeVar("Model", bound=BaseModel)

STANDARD_INPUT = Path("-")


def load(
    files: Sequence[Path] = (),
    flags: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    beneath: Mapping[str, Any] | None = None,
) -> ClusterConfig:
    """The effective configuration.

    Args:
        files: YAML files, merged in order; `-` is standard input.
        flags: `--dotted.key=value`, `--dotted.key value`, or, for a switch, `--dotted.key`.
        environ: variables named `PDSERVE_KEY__SUBKEY` are read.
        beneath: lies under the files, over the defaults.

    The value of a flag or variable is YAML, but text is taken as it is, and a list may go without brackets.

    Raises:
        ConfigError: with one line for each key at fault.
        HostError: a file can't be read for want of something.
    """
    # Not at the top: engines and ranks get their arguments from their parents, and start the faster.
    from pdserve.config import sources

    laid = [sources.from_data(beneath or {})]
    for file in files:
        stream = sys.stdin.buffer if file == STANDARD_INPUT else None
        laid.append(sources.from_data(read_file(file, stream, ClusterConfig)))
    if texts := settings(environ or {}, ClusterConfig):
        laid.append(sources.from_variables(texts))
    if flags:
        laid += sources.from_flags(flags)
    return validated(ClusterConfig, sources.merged(laid[::-1]))


def validated(model: type[Model], data: Any) -> Model:
    """`data` as a `model`. Raises ConfigError with one line for each key at fault."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model) from None

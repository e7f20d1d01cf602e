"""Passwords in what is printed."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

# A password may hold "/", ":" and "@"; it ends at the last "@".
_PASSWORD_IN_URI = re.compile(r"(?<=://)([^:/@]*):.*@", re.DOTALL)


def masked(config: BaseModel) -> dict[str, Any]:
    """`config` as plain data with passwords hidden, fit to print."""
    return {key: mask(value) for key, value in config.model_dump(mode="json").items()}


def mask(value: Any) -> Any:
    """`value`, plain data, with passwords hidden."""
    if isinstance(value, dict):
        return {key: mask(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner) for inner in value]
    return _PASSWORD_IN_URI.sub(r"\1:***@", value) if isinstance(value, str) else value

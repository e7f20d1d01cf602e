"""Passwords in what is printed: the effective configuration, and errors that repeat what was given."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

# A password may hold anything, "/", ":" and "@" too; it ends at the last "@", if a host and a port follow that.
_CREDENTIALS = re.compile(r"(?<=://)([^:]*):.*@", re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[\da-fA-F:.%]+\]|[\w.-]+):\d")
# Where the host was forgotten, what follows the user is no port.
_WITHOUT_HOST = re.compile(r"(?<=etcd://)([^:\[]*):(?!\d+(?:\W|$)).*", re.DOTALL)


def masked(config: BaseModel) -> dict[str, Any]:
    """`config` as plain data with passwords hidden, fit to print."""
    return {key: mask(value) for key, value in config.model_dump(mode="json").items()}


def mask(value: Any) -> Any:
    """`value`, plain data, with passwords hidden."""
    if isinstance(value, dict):
        return {key: mask(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [mask(inner) for inner in value]
    return mask_text(value) if isinstance(value, str) else value


def mask_text(text: str) -> str:
    """`text` with the passwords of URIs in it hidden. Rather too much is hidden than too little."""
    found = _CREDENTIALS.search(text)
    if found is None:
        return _WITHOUT_HOST.sub(r"\1:***", text)
    rest = text[found.end() :]
    return f"{text[: found.end(1)]}:***{'@' + rest if _HOST_AND_PORT.match(rest) else ''}"

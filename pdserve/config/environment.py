"""`PDSERVE_` variables as keys: `PDSERVE_PORT`, `PDSERVE_CONTEXT_SERVERS__NUM_INSTANCES`.

A variable that names no key is an error, as an unknown key is. Kubernetes sets variables for each service, of whatever
port; for a service named `pdserve`, or `pdserve-something`, they begin like ours, and are known by their form.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from pydantic import BaseModel

from pdserve.config.mistakes import suggestion
from pdserve.config.schema import annotation_at, field_at, section_of
from pdserve.config.yaml_text import as_json
from pdserve.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "PDSERVE_"
# Not keys: where converted models are kept.
_OTHERS = frozenset({"PDSERVE_CACHE"})

_SERVICE = re.compile(
    r"PDSERVE_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)", re.ASCII
)
_SERVICE_PORT, _SERVICE_URL = re.compile(r"PDSERVE_(\w+_)?PORT", re.ASCII), re.compile(r"(tcp|udp|sctp)://\S+:\d+")


def settings(environ: Mapping[str, str], root: type[BaseModel]) -> dict[str, str]:
    """The variables of `environ` that set keys, by their names in small letters, with their values as pydantic-settings
    reads them. Sections come before what is in them. An empty variable is not set.

    Raises:
        ConfigError: with a line for each variable that names no key.
    """
    found: dict[str, str] = {}
    faults: list[str] = []
    of_services: list[str] = []
    for name in sorted(name for name, text in environ.items() if is_setting(name) and text):
        path = tuple(name.removeprefix(PREFIX).lower().split("__"))
        if _is_of_a_service(name, environ[name]):
            of_services.append(name)
        elif (field := field_at(root, path)) is None:
            faults.append(_fault(name, path, root))
        else:
            found[name.lower()] = as_json(environ[name], field.annotation, ".".join(path))
    if faults:
        raise ConfigError("\n".join(faults), faults[0].partition(":")[0])
    if of_services:
        log.info("%s: of a Kubernetes service, not settings", ", ".join(of_services))
    return found


def is_setting(name: str) -> bool:
    """Whether a variable of this name is read as a key."""
    return name.startswith(PREFIX) and name not in _OTHERS


def _is_of_a_service(name: str, text: str) -> bool:
    url = _SERVICE_PORT.fullmatch(name) and _SERVICE_URL.fullmatch(text)
    return _SERVICE.fullmatch(name) is not None or bool(url)


def _fault(name: str, path: tuple[str, ...], root: type[BaseModel]) -> str:
    right = _with_levels(path[-1], path[:-1], root) or suggestion(path, root)
    hint = (
        f"; did you mean {PREFIX}{'__'.join(right).upper()}?" if right else "; `pdserve config --help` lists all keys"
    )
    return f"{name}: no key {'.'.join(path)} of the configuration{hint}"


def _with_levels(name: str, above: tuple[str, ...], root: type[BaseModel]) -> tuple[str, ...] | None:
    """The path that is meant by one "_" where two should be."""
    section = section_of(annotation_at(root, above))
    for field in section.model_fields if section else ():
        path = (*above, field, name.removeprefix(f"{field}_"))
        if name.startswith(f"{field}_") and field_at(root, path) is not None:
            return path
    return None

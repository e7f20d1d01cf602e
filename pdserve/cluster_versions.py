"""How the manager and its clients of different releases understand each other.

Readers of today's release and later take what they know of a message and leave the rest alone, so fields may be added
at any time. Processes of the first release refuse a message that has a field more. They say no version, and are told
only what their release knew: by the manager in its answers, and by clients to a manager that refused a whole message.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from pydantic import BaseModel

API_HEADER = "X-Pdserve-Api"
API_VERSION = 2
FIRST_VERSION = 1

_FIRST_FIELDS: dict[str, tuple[str, ...]] = {
    "KvRankEndpoint": ("instance", "host", "port", "layout"),
    "KvEndpoint": ("worker_id", "instance", "host", "port", "layout_hash", "ranks"),
    "WorkerInfo": (
        *("worker_id", "incarnation", "role", "url", "model", "max_seq_len", "tokens_per_block"),
        *("kv", "pid", "device", "dtype", "started_at"),
    ),
    "WorkerLoad": ("running", "waiting", "blocks_available", "blocks_total"),
    "WorkerRecord": ("info", "state", "load"),
    "RegisterRequest": ("info",),
    "RegisterReply": ("lease_id", "ttl_s", "heartbeat_interval_s"),
    "HeartbeatRequest": ("lease_id", "incarnation", "load"),
    "HeartbeatReply": ("state", "ttl_s"),
    "WorkerList": ("revision", "workers"),
    "WatchEvent": ("type", "revision", "worker_id", "worker", "workers", "epoch"),
    "RoleCount": ("ready", "draining", "required"),
    "ClusterStatus": ("cluster_name", "store", "ready", "context_servers", "generation_servers"),
    "StoredWorker": ("lease_id", "record"),
}


def version_of(headers: Mapping[str, str]) -> int:
    """The version that a message's sender speaks, by its headers."""
    told = headers.get(API_HEADER, "")
    return int(told) if told.isdecimal() and len(told) < 10 else FIRST_VERSION


def to_json(message: BaseModel, version: int = API_VERSION) -> bytes:
    """`message` for a reader of `version`, without what it leaves at None."""
    if version > FIRST_VERSION:
        return message.model_dump_json(exclude_none=True).encode()
    return msgspec.json.encode(_as_of_first_version(message))


def _as_of_first_version(value: Any) -> Any:
    if isinstance(value, BaseModel):
        known = {name: getattr(value, name) for name in _FIRST_FIELDS[type(value).__name__]}
        return {name: _as_of_first_version(inner) for name, inner in known.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_as_of_first_version(inner) for inner in value]
    return value

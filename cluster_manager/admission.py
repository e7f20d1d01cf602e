"""What the manager checks of a registration before it tells others of it.

Proxies send prompts where a registration points, and dial it over and over. Whoever can reach the manager's port can
register, so this keeps out mistakes and what would harm others by its form; it proves nobody's identity. What limits
the harm of a wrong address: a proxy sends prompts only over a socket on which the worker has said that it is the one
of this name.
"""

from __future__ import annotations

from pdserve.addresses import host_of_url, is_every_address
from pdserve.cluster_api import KvEndpoint, WorkerInfo
from pdserve.errors import RequestError

_MAX_CHARACTERS = {"worker_id": 200, "incarnation": 64, "model": 1024, "device": 200, "dtype": 40}
_MAX_KV_CHARACTERS = {"worker_id": 200, "instance": 64, "host": 255, "layout_hash": 200}
_MAX_RANKS = 1024
_POSITIVE = ("max_seq_len", "tokens_per_block")
_MAX_PORT = 65535


def check_registration(info: WorkerInfo) -> None:
    """Raises `RequestError`, naming the field, for a registration that no worker of ours makes."""
    _check_texts("info", info, _MAX_CHARACTERS)
    for name in _POSITIVE:
        if getattr(info, name) < 1:
            raise _mistake(f"info.{name}", "must be at least 1")
    try:
        host_of_url(info.url)
    except ValueError as error:
        raise _mistake("info.url", str(error)) from None
    if info.kv is not None:
        _check_kv(info.kv)


def _check_kv(kv: KvEndpoint) -> None:
    _check_texts("info.kv", kv, _MAX_KV_CHARACTERS)
    if len(kv.ranks) > _MAX_RANKS:
        raise _mistake("info.kv.ranks", f"more than {_MAX_RANKS}")
    places = [("info.kv", kv.host, kv.port)]
    places += [(f"info.kv.ranks.{number}", rank.host, rank.port) for number, rank in enumerate(kv.ranks)]
    for path, kv_host, port in places:
        if not 0 <= port <= _MAX_PORT:  # 0: it is never called, but calls others
            raise _mistake(f"{path}.port", f"must be from 0 to {_MAX_PORT}")
        if kv_host and is_every_address(kv_host):
            raise _mistake(f"{path}.host", "is an address to listen at, which nobody can connect to")


def _check_texts(path: str, message: WorkerInfo | KvEndpoint, limits: dict[str, int]) -> None:
    for name, limit in limits.items():
        text = getattr(message, name)
        if len(text) > limit:
            raise _mistake(f"{path}.{name}", f"longer than {limit} characters")
        if not text.isprintable():
            raise _mistake(f"{path}.{name}", "has characters that can't be printed")


def _mistake(path: str, what: str) -> RequestError:
    return RequestError(f"{path}: {what}", path)

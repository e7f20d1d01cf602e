"""Names of requests: the answer's own id, and the `X-Request-Id` that client and logs share."""

from __future__ import annotations

import re
import secrets

from aiohttp import web

HEADER = "X-Request-Id"

_ACCEPTABLE = re.compile(r"[\x21-\x7e]{1,128}")


def new_id(kind: str) -> str:
    """A new id such as `cmpl-5b1e...`. Never the client's: two requests may carry the same `X-Request-Id`, and
    workers key their tables by this one."""
    return f"{kind}-{secrets.token_hex(12)}"


def request_id_of(request: web.Request) -> str:
    """The client's `X-Request-Id` if it is printable ASCII of at most 128 characters, else a new one."""
    given = request.headers.get(HEADER, "")
    return given if _ACCEPTABLE.fullmatch(given) else new_id("req")

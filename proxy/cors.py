"""Cross-origin requests: which pages may call this server from a browser (Fetch standard, "CORS protocol").

No cookies or other credentials of the browser are asked for, so any origin may be allowed.
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from pdserve.http import Handler

_METHODS = "GET, POST, OPTIONS"
_HEADERS = "Authorization, Content-Type, X-Request-Id"
_EXPOSED = "X-Request-Id, Retry-After"
_MAX_AGE_S = 600


class Cors:
    """`origins` may call; "*" among them is any."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins = frozenset(origins)
        self._any = "*" in self._origins

    @web.middleware
    async def preflight(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer the question that a browser asks before its request, for every route."""
        if request.method != "OPTIONS" or "Access-Control-Request-Method" not in request.headers:
            return await handler(request)
        headers = {
            "Access-Control-Allow-Methods": _METHODS,
            # Clients send headers of their own, and "*" does not cover Authorization.
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", _HEADERS),
            "Access-Control-Max-Age": str(_MAX_AGE_S),
        }
        return web.Response(status=204, headers=headers if self._allowed(request) else None)

    async def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Say on an answer, also one with an error, that the page may read it."""
        if "Origin" not in request.headers:
            return
        allowed = self._allowed(request)
        if allowed is not None:
            response.headers["Access-Control-Allow-Origin"] = allowed
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED
        if not self._any:
            response.headers["Vary"] = "Origin"

    def _allowed(self, request: web.Request) -> str | None:
        """What to answer the page's origin; None if it may not call."""
        if self._any:
            return "*"
        origin = request.headers.get("Origin", "")
        return origin if origin in self._origins else None

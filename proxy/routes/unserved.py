"""What OpenAI's API has and this server does not: each is refused by its name, whatever the method.

A client then reads what is missing, and not that some address is unknown. The status is 404: clients repeat what fails
with a 5xx.
"""

from __future__ import annotations

from collections.abc import Mapping

from aiohttp import web

from pdserve.errors import NotServed
from pdserve.http import Handler

UNSERVED: Mapping[str, str] = {
    "/v1/assistants": "assistants",
    "/v1/audio": "audio endpoints",
    "/v1/batches": "batches",
    "/v1/containers": "containers",
    "/v1/conversations": "conversations",
    "/v1/embeddings": "embeddings",
    "/v1/evals": "evals",
    "/v1/files": "files",
    "/v1/fine_tuning": "fine-tuning jobs",
    "/v1/images": "image endpoints",
    "/v1/moderations": "moderations",
    "/v1/realtime": "realtime sessions",
    "/v1/responses": "responses",
    "/v1/threads": "threads",
    "/v1/uploads": "uploads",
    "/v1/vector_stores": "vector stores",
    "/v1/videos": "videos",
}
"""What each path, and those below it, are of. A row of `proxy.endpoints` for one of them goes before."""


def refuse_unserved(app: web.Application) -> None:
    """Route what is not served to its refusal. After this, the application must get no route for any of it."""
    for path, name in UNSERVED.items():
        app.router.add_route("*", path + "{below:(?:/.*)?}", _refusal(name))


def _refusal(name: str) -> Handler:
    async def refuse(_: web.Request) -> web.StreamResponse:
        raise NotServed(f"{name} are not served by pdserve")

    return refuse

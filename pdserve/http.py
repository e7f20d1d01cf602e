"""What every HTTP server of the system shares: typed bodies in, errors and metrics out, an orderly start.

Errors are answered in OpenAI's JSON form with the status that `pdserve.errors` fixes; whatever a handler raises
that is not of that tree is logged and answered 500 without its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
import psutil
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError

from pdserve.addresses import bare, host_port
from pdserve.config import mask_text
from pdserve.errors import (
    BodyTooLarge,
    ListenError,
    MethodNotAllowed,
    PdserveError,
    RequestError,
    RequestTimeout,
    RouteNotFound,
)
from pdserve.http_connections import ConnectionLimits, ConnectionSite

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Model = TypeVar("Model", bound=BaseModel)

BODY_TIMEOUT_S = 30.0
"""How long a body may take to arrive."""


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn errors raised before a response has started into JSON answers."""
    try:
        return await handler(request)
    except PdserveError as error:
        answer = error_response(error)
        if request.content.exception() is not None:
            answer.force_close()  # what follows a broken body is no request
        return answer
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return error_response(_from_aiohttp(request, error))
    except (ConnectionError, TimeoutError):
        raise
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return error_response(PdserveError("internal error; the server's log has the details"))


def error_response(error: PdserveError) -> web.Response:
    """`error` as an HTTP answer."""
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return json_response(error.to_openai(), status=error.status, headers=headers)


def json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """`data` (plain data, msgspec struct or pydantic model) as a JSON answer."""
    body = data.model_dump_json().encode() if isinstance(data, BaseModel) else msgspec.json.encode(data)
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def read_body(request: web.Request, model: type[Model]) -> Model:
    """The request's JSON body as `model`.

    Raises:
        RequestError: see `receive` and `parse_body`.
    """
    return parse_body(await receive(request), model)


async def receive(request: web.Request, charge: Callable[[int], None] | None = None) -> bytes:
    """The bytes of the request's body.

    Args:
        charge: called with the size of each piece as it arrives; may raise to end the reading.

    Raises:
        BodyTooLarge: over the application's `client_max_size`.
        RequestTimeout: not all of it came in time.
        RequestError: it is not what its `Content-Encoding` says.
    """
    limit_bytes = request.client_max_size
    pieces, size_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while not request.content.at_eof():
                piece = await request.content.readany()
                size_bytes += len(piece)
                if size_bytes > limit_bytes or (request.content_length or 0) > limit_bytes:
                    raise BodyTooLarge(f"the body is larger than {limit_bytes} bytes", "body")
                if charge is not None:
                    charge(len(piece))
                pieces.append(piece)
    except TimeoutError:
        raise RequestTimeout(f"the body did not arrive within {BODY_TIMEOUT_S:g} s", "body") from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body can't be read: {error}", "body") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def parse_body(raw: bytes, model: type[Model], decode: Callable[[bytes], object] = msgspec.json.decode) -> Model:
    """`raw` as `model`.

    Args:
        decode: from JSON in UTF-8 to plain data.

    Raises:
        RequestError: not UTF-8, not JSON, or a field that is unknown or not allowed; `param` names the field.
    """
    try:
        raw.decode("utf-8")  # msgspec takes strings as they are
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not valid UTF-8: byte {error.start}", "body") from None
    try:
        data = decode(raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise RequestError(f"the body is not valid JSON: {error}", "body") from None
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, not {type(data).__name__}", "body")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _invalid_field(error) from None


def read_query(request: web.Request, model: type[Model]) -> Model:
    """The request's query string as `model`.

    Raises:
        RequestError: a parameter that is unknown, missing, given twice or not allowed; `param` names it.
    """
    query = request.query
    for name in query:
        if len(query.getall(name)) > 1:
            raise RequestError(f"{name}: given more than once", name)
    try:
        return model.model_validate(dict(query))
    except ValidationError as error:
        raise _invalid_field(error) from None


def metrics_handler(registry: CollectorRegistry, refresh: Callable[[], None] = lambda: None) -> Handler:
    """A `GET /metrics` handler; `refresh` runs before each scrape."""

    async def metrics(_: web.Request) -> web.Response:
        refresh()
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return metrics


def bind(hostname: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Bound before anything slow, so that a taken port fails at once.

    Raises:
        ListenError: the address is taken or not this host's.
        OSError: the system lacks descriptors or memory.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            bare(hostname), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ListenError(f"can't listen on {host_port(hostname, port)}: {error.strerror}", "hostname") from None
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _listen_error(error, hostname, port) from None
    return listener


async def start(app: web.Application, listener: socket.socket, limits: ConnectionLimits | None = None) -> web.AppRunner:
    """Serve `app` on `listener`; the caller ends it with `cleanup()`.

    Raises:
        ListenError: another process took the address since it was bound.
    """
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=5.0)
    await runner.setup()
    try:
        await ConnectionSite(runner, listener, limits or ConnectionLimits()).start()
    except OSError as error:
        await runner.cleanup()
        raise _listen_error(error, *listener.getsockname()[:2]) from None
    return runner


def _listen_error(error: OSError, hostname: str, port: int) -> ListenError | OSError:
    if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
        return OSError(error.errno, f"can't listen on {host_port(hostname, port)}: {error.strerror}")
    holder = listening_process(port) if error.errno == errno.EADDRINUSE else None
    by = f" by {holder}" if holder else ""
    return ListenError(f"can't listen on {host_port(hostname, port)}: {error.strerror}{by}", "port")


def listening_process(port: int) -> str | None:
    """Who listens on `port` of this host, as "pid 17 (its command)"; None if that can't be seen."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1] == port and connection.pid:
                command = mask_text(" ".join(psutil.Process(connection.pid).cmdline()))
                return f"pid {connection.pid} ({command[:80]})"
    return None


def _invalid_field(error: ValidationError) -> RequestError:
    detail = error.errors()[0]
    field = ".".join(str(part) for part in detail["loc"])
    message = detail["msg"].removeprefix("Value error, ")
    return RequestError(f"{field}: {message}" if field else message, field or None)


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> PdserveError:
    if isinstance(error, web.HTTPNotFound):
        return RouteNotFound(f"no route {request.path}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.method} is not allowed for {request.path}; allowed: {allowed}")
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return BodyTooLarge(f"the body is larger than {request.client_max_size} bytes", "body")
    return RequestError(error.reason)

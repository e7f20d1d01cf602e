"""A client of the cluster manager, for workers and proxies.

Owns its HTTP session unless it is given one. Single calls fail with the manager's own error, or with `NotReady` when
the manager can't be reached. `watch` never fails: it delivers what the manager sends and reconnects in between,
resuming where it was. A manager that lost its memory sends a snapshot without workers until they have registered
again; the client passes that on, and the consumer decides what a connection that still works is worth.

Every request says this release's version. A manager of the first release, which refuses fields that it does not know,
is asked again without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import aiohttp
import msgspec
from pydantic import BaseModel, ValidationError

from pdserve.cluster_api import (
    BOOKMARK_INTERVAL_S,
    ClusterStatus,
    HeartbeatReply,
    HeartbeatRequest,
    RegisterReply,
    RegisterRequest,
    Schema,
    WatchEvent,
    WorkerInfo,
    WorkerList,
    WorkerLoad,
    WorkerRecord,
)
from pdserve.cluster_versions import API_HEADER, API_VERSION, FIRST_VERSION, to_json, version_of
from pdserve.errors import ErrorInfo, MalformedMessage, NotReady, PdserveError, from_info
from pdserve.protocol import Role, decode

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=BaseModel)

_VERSION = {API_HEADER: str(API_VERSION)}
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.1, 5.0
_MISSED_BOOKMARKS = 3


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class ClusterClient:
    """Talks to the manager at `base_url`; an async context manager.

    Args:
        base_url: `http://host:port`.
        session: used and not closed; without one the client makes its own.
        timeout_s: the limit for one call, and for connecting a watch.
        bookmark_interval_s: how often the manager breaks the silence of a watch.
    """

    def __init__(
        self,
        base_url: str,
        session: aiohttp.ClientSession | None = None,
        timeout_s: float = 5.0,
        bookmark_interval_s: float = BOOKMARK_INTERVAL_S,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = session
        self._owns_session = session is None
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._watch_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=timeout_s, sock_read=_MISSED_BOOKMARKS * bookmark_interval_s
        )
        self._connected = False

    async def __aenter__(self) -> ClusterClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the session, if it is the client's own."""
        if self._session and self._owns_session:
            await self._session.close()

    @property
    def connected(self) -> bool:
        """Whether a watch is connected now, so that its view is current."""
        return self._connected

    async def register(self, info: WorkerInfo) -> RegisterReply:
        """Join the cluster; replaces an earlier registration of the same worker.

        Raises:
            Superseded: a newer registration of the same worker stands.
        """
        return await self._call("POST", "/v1/workers", RegisterReply, body=RegisterRequest(info=info))

    async def heartbeat(self, worker_id: str, lease_id: str, incarnation: str, load: WorkerLoad) -> HeartbeatReply:
        """Renew a lease. Raises `UnknownLease` when it is lost."""
        body = HeartbeatRequest(lease_id=lease_id, incarnation=incarnation, load=load)
        return await self._call("POST", f"/v1/workers/{worker_id}/heartbeat", HeartbeatReply, body=body)

    async def deregister(self, worker_id: str, lease_id: str) -> None:
        """Leave the cluster. Raises `UnknownLease` when this registration has ended already."""
        await self._request("DELETE", f"/v1/workers/{worker_id}", params={"lease_id": lease_id})

    async def drain(self, worker_id: str) -> WorkerRecord:
        """Ask a worker to finish its requests and leave. Raises `UnknownWorker`."""
        return await self._call("POST", f"/v1/workers/{worker_id}/drain", WorkerRecord)

    async def workers(self, role: Role | None = None) -> WorkerList:
        """The live workers, all or of one role."""
        return await self._call("GET", "/v1/workers", WorkerList, params={"role": role} if role else None)

    async def cluster(self) -> ClusterStatus:
        """How many workers of each role there are and should be."""
        return await self._call("GET", "/v1/cluster", ClusterStatus)

    async def watch(self) -> AsyncGenerator[WatchEvent, None]:
        """The cluster's changes, from a snapshot on, without end; raises nothing but cancellation.

        After a lost connection the stream goes on without a gap and without repetition, or starts over with another
        snapshot. Bookmarks are delivered too.
        """
        position: dict[str, str] = {}
        delays = backoff()
        while True:
            try:
                async with contextlib.aclosing(self._stream(position)) as events:
                    async for event in events:
                        position["from_revision"] = str(event.revision + 1)
                        if event.epoch is not None:
                            position["epoch"] = event.epoch
                        self._connected, delays = True, backoff()
                        yield event
                log.info("the manager at %s ended the watch", self._base_url)
            except (PdserveError, ValidationError) as error:
                log.warning("the watch at %s broke: %s", self._base_url, error)
            finally:
                self._connected = False
            await asyncio.sleep(next(delays))

    async def _stream(self, position: dict[str, str]) -> AsyncGenerator[WatchEvent, None]:
        try:
            async with self._open().get(
                f"{self._base_url}/v1/watch", params=position, headers=_VERSION, timeout=self._watch_timeout
            ) as response:
                if response.status != 200:
                    raise _error(response.status, await response.read())
                rest = b""
                async for chunk in response.content.iter_any():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for event in filter(None, map(_event, lines)):
                        yield event
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None

    async def _call(
        self,
        method: str,
        path: str,
        model: type[Model],
        body: BaseModel | None = None,
        params: dict[str, Any] | None = None,
    ) -> Model:
        raw = await self._request(method, path, body, params)
        try:
            return model.model_validate_json(raw)
        except ValidationError as error:
            raise PdserveError(f"the manager's answer to {method} {path} can't be read: {error}") from None

    async def _request(
        self, method: str, path: str, body: BaseModel | None = None, params: dict[str, Any] | None = None
    ) -> bytes:
        answer = await self._send(method, path, body, params, API_VERSION)
        if body is not None and answer.status == 400 and version_of(answer.headers) == FIRST_VERSION:
            answer = await self._send(method, path, body, params, FIRST_VERSION)
        if answer.status >= 400:
            raise _error(answer.status, answer.body)
        return answer.body

    async def _send(
        self, method: str, path: str, body: BaseModel | None, params: dict[str, Any] | None, version: int
    ) -> _Answer:
        data = None if body is None else to_json(body, version)
        headers = _VERSION if body is None else {**_VERSION, "Content-Type": "application/json"}
        try:
            async with self._open().request(
                method, self._base_url + path, data=data, headers=headers, params=params, timeout=self._timeout
            ) as response:
                return _Answer(response.status, response.headers, await response.read())
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._unreachable(error) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    def _unreachable(self, error: Exception) -> NotReady:
        return NotReady(f"the cluster manager at {self._base_url} can't be reached: {error or type(error).__name__}")


def backoff() -> Iterator[float]:
    """Delays in seconds that double up to a limit, each shortened by up to a half so that peers spread out."""
    delay = _FIRST_DELAY_S
    while True:
        yield delay * random.uniform(0.5, 1.0)
        delay = min(2 * delay, _LONGEST_DELAY_S)


def _event(line: bytes) -> WatchEvent | None:
    """The event in a line of a watch stream; None for one of a kind that this version can't read.

    Raises:
        ValidationError: it is no event of any version.
    """
    try:
        return WatchEvent.model_validate_json(line)
    except ValidationError:
        unknown = _AnyEvent.model_validate_json(line)
        log.warning("an event that can't be read is left out: type %s, revision %d", unknown.type, unknown.revision)
        return None


class _AnyEvent(Schema):
    type: str
    revision: int


def _error(status: int, raw: bytes) -> PdserveError:
    """The error in an answer; one that isn't the manager's (a load balancer's page) keeps its status in the text."""
    try:
        fields = decode(msgspec.json.Decoder(), raw)["error"]
        info = ErrorInfo(str(fields["code"]), str(fields["message"]), fields["param"], status)
    except (MalformedMessage, KeyError, TypeError):
        return NotReady(f"the cluster manager answered with status {status}")
    return from_info(info)

"""Whether the processes that were started are the ones that answer.

An address may be another cluster's, and a registration another worker's of the same name. So each process is started
with an identity of its own, which its /health says, and only that proves it ready.
"""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
from pydantic import ValidationError

from pdserve.addresses import http_url
from pdserve.cluster_api import WorkerList
from pdserve.config import ClusterConfig

_TIMEOUT = aiohttp.ClientTimeout(total=2.0)


class Readiness:
    """Asks the processes of `config`; an async context manager."""

    def __init__(self, config: ClusterConfig) -> None:
        self._manager = http_url(config.manager.hostname, config.manager.port)
        self._proxy = http_url(config.hostname, config.port)

    async def __aenter__(self) -> Readiness:
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ready(self, instances: dict[str, str]) -> set[str]:
        """Those of the processes `instances` (identities by name) that are ready."""
        places = [("manager", self._manager), ("proxy", self._proxy)]
        if instances.keys() - {"manager", "proxy"}:
            places += await self._workers()
        asked = [place for place in places if place[0] in instances]
        answers = await asyncio.gather(*(self._instance(url) for _, url in asked))
        return {name for (name, _), answer in zip(asked, answers, strict=True) if answer == instances[name]}

    async def _instance(self, url: str) -> str | None:
        """Who answers at `url` that it is ready."""
        raw = await self._get(f"{url}/health")
        try:
            return None if raw is None else str(msgspec.json.decode(raw)["instance"])
        except (msgspec.DecodeError, KeyError, TypeError):
            return None

    async def _workers(self) -> list[tuple[str, str]]:
        """Names of registered workers, without their host, with their addresses: several hosts may have a name."""
        raw = await self._get(f"{self._manager}/v1/workers")
        try:
            workers = [] if raw is None else WorkerList.model_validate_json(raw).workers
        except ValidationError:
            workers = []
        return [(record.info.worker_id.partition(".")[0], record.info.url) for record in workers]

    async def _get(self, url: str) -> bytes | None:
        try:
            async with self._session.get(url) as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

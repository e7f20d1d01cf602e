"""`POST /v1/bench/kv`: measure handoffs between this worker and another, both of which go on serving.

Owns the requests that only move KV (`GenerateRequest.kv_only`), and waits for their ends. The engine decides which
blocks they may take. The caller asks both workers, the generation worker first: that one expects all handoffs at once,
the context worker makes one after the other. When the caller goes away, the handoffs that are left are aborted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from aiohttp import web
from pydantic import ConfigDict, Field

from pdserve.cluster_api import KvEndpoint, Schema
from pdserve.errors import PdserveError, RequestError, from_info
from pdserve.http import json_response, read_body
from pdserve.protocol import AbortRequest, Finished, GenerateRequest, Key, Role, Sampling

MAX_REPEATS = 1000


class KvBenchRequest(Schema):
    """What to measure. An unknown field is refused, for the measurement would not be what was asked for.

    Attributes:
        name: of the measurement: new for each, the same for both workers.
        peer: the other worker.
        num_tokens: KV of so many tokens is moved in each handoff.
        repeats: how many handoffs.
        timeout_s: all of them must end within so many seconds.
        evict: whether they may take blocks that hold cached prefixes.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9._-]+$")
    peer: KvEndpoint
    num_tokens: int = Field(ge=1)
    repeats: int = Field(default=1, ge=1, le=MAX_REPEATS)
    timeout_s: float = Field(default=30.0, gt=0, le=3600)
    evict: bool = False


class KvBenchHandoff(Schema):
    """By the clock of this worker's transceiver: `seconds` from the offer to the end, `moving_s` from its first pack,
    `busy_s` with payload under way."""

    nbytes: int
    seconds: float
    moving_s: float
    busy_s: float


class KvBenchReply(Schema):
    handoffs: list[KvBenchHandoff]


class KvBench:
    """The route's handler.

    Args:
        role: which end of the handoffs this worker is.
        admit: raises the reason why no request may be submitted now.
        forward: hands a message to the engine.
    """

    def __init__(
        self, role: Role, admit: Callable[[], None], forward: Callable[[GenerateRequest | AbortRequest], None]
    ) -> None:
        self._role: Role = role
        self._admit = admit
        self._forward = forward
        self._ends: dict[Key, asyncio.Future[Finished]] = {}

    async def handle(self, request: web.Request) -> web.Response:
        """Make the handoffs that the body asks for.

        Raises:
            PdserveError: one has failed, or the engine refuses it; the others are aborted.
        """
        self._admit()
        body = await read_body(request, KvBenchRequest)
        keys = [Key(f"kv-bench.{body.name}.{number}", 0) for number in range(body.repeats)]
        if not self._ends.keys().isdisjoint(keys):
            raise RequestError(f"{body.name} is being measured already", "name")
        try:
            return json_response(KvBenchReply(handoffs=[_as_reply(end) for end in await self._run(keys, body)]))
        finally:
            for key in keys:
                # The caller's going cancels the future that is awaited, whose handoff has not ended.
                if (end := self._ends.pop(key, None)) is not None and (end.cancelled() or not end.done()):
                    self._forward(AbortRequest(key))

    def deliver(self, finished: Iterable[Finished]) -> None:
        """Take note of the ends among `finished` that somebody waits for here."""
        for each in finished if self._ends else ():
            if (end := self._ends.get(each.key)) is not None and not end.done():
                end.set_result(each)

    def fail_all(self, error: PdserveError) -> None:
        """The engine is gone, or the worker ends."""
        self.deliver([Finished(key, "error", error=error.to_info()) for key in self._ends])

    async def _run(self, keys: list[Key], body: KvBenchRequest) -> list[Finished]:
        if self._role == "context":
            return [await self._submit(key, body) for key in keys]
        ends = [self._submit(key, body) for key in keys]
        return [await end for end in ends]

    def _submit(self, key: Key, body: KvBenchRequest) -> asyncio.Future[Finished]:
        end = self._ends[key] = asyncio.get_running_loop().create_future()
        request = GenerateRequest(
            key=key,
            token_ids=[0] * body.num_tokens,
            num_prompt_tokens=body.num_tokens,
            sampling=Sampling(seed=0, max_tokens=1),
            timeout_s=body.timeout_s,
            phase=self._role,
            peer=body.peer.address(),
            kv_only=True,
            evict=body.evict,
        )
        self._forward(request)
        return end


def _as_reply(finished: Finished) -> KvBenchHandoff:
    """Raises the error of a handoff that has failed."""
    if finished.error is not None:
        raise from_info(finished.error)
    if finished.reason != "handoff":
        raise PdserveError(f"{finished.key} ended with {finished.reason!r}")
    timings = finished.timings
    return KvBenchHandoff(
        nbytes=finished.kv_bytes, seconds=timings.handoff_s, moving_s=timings.moving_s, busy_s=timings.transfer_s
    )

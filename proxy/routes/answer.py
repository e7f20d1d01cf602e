"""How a job becomes an HTTP answer: in one piece, or as server-sent events.

Owns the reading loop, the latency metrics, and errors before and after the first byte. What a choice looks like in
JSON is the `Format`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from pdserve.errors import PdserveError
from pdserve.http import json_response
from proxy.choice import Choice, Piece
from proxy.job import Job
from proxy.metrics import Metrics
from proxy.routes.events import DONE, error_event
from proxy.schemas.fields import SamplingFields
from proxy.schemas.usage import UsageInfo
from proxy.service import Service

log = logging.getLogger(__name__)

_STREAM_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}
_SLOW_CLIENT_S = 10.0
"""How long after a request's deadline a client may still be reading."""


class Format(Protocol):
    """One endpoint's JSON."""

    def whole(self, job: Job, pieces: Sequence[Piece], usage: UsageInfo) -> msgspec.Struct:
        """The answer in one piece; `pieces` stand in the order of the choices."""

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        """The events for what is new of `choice`."""

    def usage_chunk(self, usage: UsageInfo) -> bytes:
        """The event with the token counts, the last before the end."""


async def answer(
    service: Service, request: web.Request, job: Job, answer_format: Format, body: SamplingFields
) -> web.StreamResponse:
    """Run `job` and answer as `body` asks.

    Raises:
        PdserveError: a choice has failed before anything was sent.
    """
    n = body.n or 1
    with service.running(job):
        if not body.stream:
            return await answer_whole(job, answer_format, service.metrics, n)
        usage_n = n if body.wants_usage_chunk else None
        return await answer_streamed(request, job, answer_format, service.metrics, usage_n)


async def answer_whole(job: Job, answer_format: Format, metrics: Metrics, n: int) -> web.Response:
    """Wait for all choices, then answer.

    Raises:
        PdserveError: a choice has failed.
    """
    pieces = [Piece() for _ in job.choices]
    meter = _Meter(job, metrics)
    unfinished = len(pieces)
    while unfinished:
        for choice in await job.changed():
            piece = _read(choice)
            if piece is not None:
                meter.note(choice)
                _extend(pieces[choice.index], piece)
                unfinished -= choice.finished
    meter.finish()
    return json_response(answer_format.whole(job, pieces, job.usage(n)))


async def answer_streamed(
    request: web.Request, job: Job, answer_format: Format, metrics: Metrics, usage_n: int | None
) -> web.StreamResponse:
    """Send events as tokens come. The status line waits for the first, so that an early error has its own status.

    Args:
        usage_n: choices a prompt, to report token counts at the end; None reports none.

    Raises:
        PdserveError: a choice has failed before anything was sent. Later, the error is an event and the last one.
    """
    response = web.StreamResponse(headers=_STREAM_HEADERS)
    meter = _Meter(job, metrics)
    unfinished = len(job.choices)
    try:
        async with asyncio.timeout_at(job.deadline + _SLOW_CLIENT_S):
            while unfinished:
                events, ended = _events(await job.changed(), answer_format, meter)
                if events and not response.prepared:
                    await response.prepare(request)
                unfinished -= ended
                if events and unfinished:
                    await response.write(b"".join(events))
                    meter.wrote()
            usage = [] if usage_n is None else [answer_format.usage_chunk(job.usage(usage_n))]
            await response.write_eof(b"".join([*events, *usage, DONE]))
            meter.wrote()
            meter.finish()
    except PdserveError as error:
        if not response.prepared:
            raise
        response.force_close()
        with contextlib.suppress(ConnectionError):
            await response.write_eof(error_event(error))
    except TimeoutError:
        log.warning("a client did not read its stream in time; its connection is closed")
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError as error:
        log.debug("the client of a stream is gone: %s", error)
    return response


def _events(changed: Sequence[Choice], answer_format: Format, meter: _Meter) -> tuple[list[bytes], int]:
    """Events for what is new, and how many choices ended with it. Raises PdserveError if one has failed."""
    events: list[bytes] = []
    ended = 0
    for choice in changed:
        piece = _read(choice)
        if piece is not None:
            meter.note(choice)
            events.append(answer_format.chunk(choice, piece))
            ended += choice.finished
    return events, ended


def _read(choice: Choice) -> Piece | None:
    """What is new of `choice`. Raises PdserveError if it has failed."""
    if choice.error is not None:
        raise choice.error
    return choice.read()


def _extend(whole: Piece, piece: Piece) -> None:
    whole.text += piece.text
    whole.token_ids += piece.token_ids
    whole.scored += piece.scored
    whole.finish_reason = piece.finish_reason


class _Meter:
    """Observes one job's latencies."""

    def __init__(self, job: Job, metrics: Metrics) -> None:
        self._job = job
        self._metrics = metrics
        self._first_at: dict[int, float] = {}
        self._last_at: dict[int, float] = {}
        self._received: list[float] = []

    def note(self, choice: Choice) -> None:
        """A piece of `choice` was read."""
        received_at = choice.generation.received_at
        choice.generation.received_at = None
        if received_at is None:
            return
        self._received.append(received_at)
        if choice.index in self._last_at:
            self._metrics.itl.observe(received_at - self._last_at[choice.index])
        else:
            self._first_at[choice.index] = received_at
            self._metrics.ttft.observe(received_at - self._job.arrival)
        self._last_at[choice.index] = received_at

    def wrote(self) -> None:
        """All that was read is on its way to the client."""
        now = time.perf_counter()
        for received_at in self._received:
            self._metrics.delta_overhead.observe(now - received_at)
        self._received.clear()

    def finish(self) -> None:
        """All choices have ended."""
        self._metrics.e2e.observe(time.perf_counter() - self._job.arrival)
        for choice in self._job.choices:
            self._metrics.output_tokens.inc(choice.num_tokens)
            first_at = self._first_at.get(choice.index)
            if first_at is not None and choice.num_tokens > 1:
                took_s = self._last_at[choice.index] - first_at
                self._metrics.tpot.observe(took_s / (choice.num_tokens - 1))

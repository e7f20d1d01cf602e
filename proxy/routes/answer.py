"""How a job becomes an HTTP answer: in one piece, or as server-sent events.

Owns the reading loop, the latency metrics, and errors before and after the first byte. What a choice looks like in
JSON is the `Format`'s, the response of a stream the `EventStream`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from aiohttp import web

from pdserve.errors import PdserveError
from pdserve.http import json_response
from proxy.choice import Choice, Piece
from proxy.job import Job
from proxy.metrics import Metrics
from proxy.routes.event_stream import EventStream
from proxy.routes.events import DONE, error_event
from proxy.schemas.fields import SamplingFields
from proxy.schemas.usage import UsageInfo
from proxy.service import Service

log = logging.getLogger(__name__)

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
            piece = choice.read()
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
    stream, meter = EventStream(request), _Meter(job, metrics)
    try:
        async with asyncio.timeout_at(job.deadline + _SLOW_CLIENT_S):
            try:
                await _send_all(stream, job, answer_format, meter, usage_n)
            except PdserveError as error:
                if not stream.started:
                    raise
                await stream.fail(error_event(error))
    except TimeoutError:
        log.warning("a client did not read its stream in time; its connection is closed")
        stream.break_off()
    except ConnectionError as error:
        log.debug("the client of a stream is gone: %s", error)
    except Exception:
        # No other answer may follow on what the client has read so far.
        if stream.started:
            stream.break_off()
        raise
    return stream.response


async def _send_all(stream: EventStream, job: Job, answer_format: Format, meter: _Meter, usage_n: int | None) -> None:
    events = _Events(job, answer_format, meter, stream)
    while True:
        new = events.take(await job.changed(events.pass_on if stream.started else None))
        if not events.unfinished:
            break
        if new:
            await stream.send(new)
            meter.wrote()
    usage = b"" if usage_n is None else answer_format.usage_chunk(job.usage(usage_n))
    await stream.end(new + usage + DONE)
    meter.wrote()
    meter.finish()


class _Events:
    """A job's news as events. `unfinished` counts the choices whose end has not been seen."""

    def __init__(self, job: Job, answer_format: Format, meter: _Meter, stream: EventStream) -> None:
        self.unfinished = len(job.choices)
        self._format = answer_format
        self._meter = meter
        self._stream = stream

    def take(self, changed: Iterable[Choice]) -> bytes:
        """Events for what is new of `changed`. Raises PdserveError if one of them has failed."""
        events: list[bytes] = []
        for choice in changed:
            piece = choice.read()
            if piece is not None:
                self._meter.note(choice)
                events.append(self._format.chunk(choice, piece))
                self.unfinished -= choice.finished
        return b"".join(events)

    def pass_on(self, changed: Iterable[Choice]) -> bool:
        """Send what is new of `changed` at once. False, and nothing is done, for a slow client: the handler waits for
        it, and its tokens gather meanwhile."""
        if not self._stream.keeps_up:
            return False
        new = self.take(changed)
        if new:
            self._stream.send_now(new)
            self._meter.wrote()
        return True


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

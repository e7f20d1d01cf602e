"""How a job becomes an HTTP answer: in one piece, or as server-sent events.

Owns the reading loop, the latency metrics, and errors before and after the first byte. What a choice looks like in
JSON is the `Formatter`'s, the response of a stream the `EventStream`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Protocol

import msgspec
from aiohttp import web

from pdserve.errors import PdserveError
from pdserve.http import json_response
from proxy.choice import Choice, Piece
from proxy.job import Job
from proxy.metrics import Metrics
from proxy.routes.event_stream import EventStream
from proxy.schemas.usage import UsageInfo
from proxy.time_slice import TimeSlice

log = logging.getLogger(__name__)

_SLOW_CLIENT_S = 10.0
"""How long after a request's deadline a client may still be reading."""
_STATUS_WAIT_S = 0.5
"""How long a stream's status line waits for what the workers say."""
_SCORED_AT_ONCE = 200
"""What has log-probabilities of more tokens is written in a thread."""
_CHOICES_AT_ONCE = 64
"""News of more choices is not passed on in one callback of the event loop."""


class Formatter(Protocol):
    """The JSON of one answer of an endpoint."""

    def choice(self, choice: Choice, piece: Piece) -> msgspec.Struct:
        """One choice of an answer in one piece."""

    def whole(self, choices: Sequence[Any], usage: UsageInfo) -> msgspec.Struct:
        """The answer in one piece. `choices` stand in their order; they are encoded (`msgspec.Raw`)."""

    def news(self, choice: Choice, piece: Piece) -> bytes:
        """The events for what is new of `choice`; of the first ones too, what comes before them in a stream."""

    def end(self, usage: UsageInfo) -> bytes:
        """The last events of a stream in which all choices have ended."""

    def error(self, error: PdserveError) -> bytes:
        """The last event of a stream that has failed."""


async def answer(request: web.Request, job: Job, formatter: Formatter, metrics: Metrics) -> web.StreamResponse:
    """Answer with what `job`, which is running, makes: in one piece or in events, as its plan says.

    Raises:
        PdserveError: a choice has failed before anything was sent.
    """
    if job.plan.stream:
        return await answer_streamed(request, job, formatter, metrics)
    return await answer_whole(job, formatter, metrics)


async def answer_whole(job: Job, formatter: Formatter, metrics: Metrics) -> web.Response:
    """Wait for all choices, then answer.

    Raises:
        PdserveError: a choice has failed.
    """
    pieces = [Piece() for _ in job.choices]
    meter = _Meter(job, metrics)
    unfinished, time_slice = len(pieces), TimeSlice()
    while unfinished:
        for choice in await job.changed():
            await time_slice.pause()
            piece = choice.read()
            if piece is not None:
                meter.note(choice)
                _extend(pieces[choice.index], piece)
                unfinished -= choice.finished
    meter.finish()
    choices = []
    for choice, piece in zip(job.choices, pieces, strict=True):
        if len(piece.scored) > _SCORED_AT_ONCE:
            choices.append(await asyncio.to_thread(_encode, formatter, choice, piece))
        else:
            choices.append(_encode(formatter, choice, piece))
        await time_slice.pause()
    return json_response(formatter.whole(choices, job.usage()))


async def answer_streamed(request: web.Request, job: Job, formatter: Formatter, metrics: Metrics) -> web.StreamResponse:
    """Send events as tokens come. The status line waits a moment for the first, so that what a worker refuses at once
    has its own status, and goes out then: balancers cut requests that are not answered.

    Raises:
        PdserveError: a choice has failed before anything was sent. Later, the error is an event and the last one.
    """
    stream, meter = EventStream(request), _Meter(job, metrics)
    try:
        async with asyncio.timeout_at(job.deadline + _SLOW_CLIENT_S):
            try:
                await _send_all(stream, job, formatter, meter)
            except PdserveError as error:
                if not stream.started:
                    raise
                await stream.fail(formatter.error(error))
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
    finally:
        stream.close()
    return stream.response


async def _send_all(stream: EventStream, job: Job, formatter: Formatter, meter: _Meter) -> None:
    events = _Events(job, formatter, meter, stream)
    timer = job.wake_at(asyncio.get_running_loop().time() + _STATUS_WAIT_S)
    try:
        while True:
            changed = await job.changed(events.pass_on if stream.started else None)
            if not changed and not stream.started:
                await stream.start()
            new = await events.take_all(changed)
            if not events.unfinished:
                break
            if new:
                await stream.send(new)
                meter.wrote()
    finally:
        timer.cancel()
    await stream.end(new + formatter.end(job.usage()))
    meter.wrote()
    meter.finish()


class _Events:
    """A job's news as events. `unfinished` counts the choices whose end has not been seen."""

    def __init__(self, job: Job, formatter: Formatter, meter: _Meter, stream: EventStream) -> None:
        self.unfinished = len(job.choices)
        self._scores = job.choices[0].scores
        self._formatter = formatter
        self._meter = meter
        self._stream = stream

    async def take_all(self, changed: Collection[Choice]) -> bytes:
        """As `take`, in slices, and what is long in a thread."""
        if not self._scores and len(changed) <= 1:
            return self.take(changed)
        events, time_slice = [], TimeSlice()
        for choice in changed:
            piece = self._read(choice)
            if piece is not None and len(piece.scored) > _SCORED_AT_ONCE:
                events.append(await asyncio.to_thread(self._formatter.news, choice, piece))
            elif piece is not None:
                events.append(self._formatter.news(choice, piece))
            await time_slice.pause()
        return b"".join(events)

    def take(self, changed: Iterable[Choice]) -> bytes:
        """Events for what is new of `changed`. Raises PdserveError if one of them has failed."""
        events: list[bytes] = []
        for choice in changed:
            piece = self._read(choice)
            if piece is not None:
                events.append(self._formatter.news(choice, piece))
        return b"".join(events)

    def _read(self, choice: Choice) -> Piece | None:
        piece = choice.read()
        if piece is not None:
            self._meter.note(choice)
            self.unfinished -= choice.finished
        return piece

    def pass_on(self, changed: Collection[Choice]) -> bool:
        """Send what is new of `changed` at once. False, and nothing is done, for a slow client, many choices or many
        log-probabilities: the handler takes them, and tokens gather meanwhile."""
        if len(changed) > _CHOICES_AT_ONCE or not self._stream.keeps_up:
            return False
        if self._scores and any(choice.num_to_score > _SCORED_AT_ONCE for choice in changed):
            return False
        new = self.take(changed)
        if new:
            self._stream.send_now(new)
            self._meter.wrote()
        return True


def _encode(formatter: Formatter, choice: Choice, piece: Piece) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(formatter.choice(choice, piece)))


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
        received_at = choice.generation.output.received_at
        choice.generation.output.received_at = None
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

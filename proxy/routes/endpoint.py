"""What an endpoint that generates is made of (`Endpoint`), and how its requests are served (`_serve`).

The rows are in `proxy.endpoints`; all of them are served by the same steps: read the body, plan, make the job, run it,
answer.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
from aiohttp import web

from pdserve.errors import (
    BodyTooLarge,
    ContextLengthExceeded,
    DeadlineExceeded,
    Draining,
    EngineError,
    LimitExceeded,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestError,
    RequestTimeout,
    TransferError,
    UnsupportedMediaType,
    WorkerLost,
)
from pdserve.http import Handler
from pdserve.openapi import EVENTS, JSON, Operation
from proxy.intake import make_job, read_body
from proxy.model import ServedModel
from proxy.plan import Plan
from proxy.routes.answer import Formatter, answer
from proxy.routes.request_ids import new_id
from proxy.schemas.request import Request
from proxy.service import Service

Body = TypeVar("Body", bound=Request)

ERRORS = (
    *(RequestError, LimitExceeded, ContextLengthExceeded, ModelNotFound, RequestTimeout, BodyTooLarge),
    *(UnsupportedMediaType, Overloaded, EngineError, WorkerLost, TransferError, NotReady, Draining, DeadlineExceeded),
)
"""The errors that a request may be answered with. Of a stream that has begun, the error is the last event."""


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[Body]):
    """One row of `proxy.endpoints`.

    Attributes:
        path: of the route; requests are POSTs.
        summary: a line for the API's description.
        id_prefix: of its answers' ids.
        schema: what a body must be.
        plan: what a body asks of the model, in common terms. May raise RequestError.
        formatter: makes the writer of one answer, from the answer's id and the body.
        reply: what an answer in one piece is.
        event: what the data of a stream's event is.
    """

    path: str
    summary: str
    id_prefix: str
    schema: type[Body]
    plan: Callable[[Body, ServedModel], Plan]
    formatter: Callable[[str, ServedModel, Body], Formatter]
    reply: type[msgspec.Struct]
    event: type[msgspec.Struct]

    @property
    def operation(self) -> Operation:
        """Its description."""
        answers = {JSON: self.reply, EVENTS: self.event}
        return Operation("POST", self.path, self.summary, answers, body=self.schema, errors=ERRORS)

    def handler(self, service: Service) -> Handler:
        """Serves the endpoint's requests."""
        return functools.partial(_serve, self, service)


async def _serve(endpoint: Endpoint[Body], service: Service, request: web.Request) -> web.StreamResponse:
    arrival = time.perf_counter()
    with service.admission.visit() as visit:
        body = await read_body(service, request, endpoint.schema, visit)
        answer_id = new_id(endpoint.id_prefix)
        job = await make_job(service, endpoint.plan(body, service.model), visit, answer_id, arrival)
        formatter = endpoint.formatter(answer_id, service.model, body)
        async with service.running(job):
            return await answer(request, job, formatter, service.metrics)

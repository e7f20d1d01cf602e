"""What all handlers share: the model, the fleet, the limits, and the requests that are open.

Owns admission (at most `max_concurrent_requests`, none while draining) and the way from a validated request to a
`Job`. Life cycle: serves until `drain`, which refuses new requests and returns once the open ones have ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aiohttp import web

from pdserve.config import ClusterConfig
from pdserve.draining import Stop, drain
from pdserve.errors import Draining, LimitExceeded, Overloaded, RequestError, RequestTimeout, UnsupportedMediaType
from pdserve.http import Model, read_body
from pdserve.protocol import Sampling
from pdserve.seeds import choice_seeds
from proxy.choice import Prompt, TextOptions
from proxy.fleet.fleet import Fleet
from proxy.generation import GenerationSpec
from proxy.job import Job, JobContext
from proxy.metrics import Metrics
from proxy.model import ServedModel
from proxy.schemas.fields import SamplingFields

log = logging.getLogger(__name__)

MAX_CHOICES_PER_REQUEST = 4096
_BODY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks for, in the terms that both endpoints share.

    `max_tokens` None means the model's own default, or the rest of the context. `sampling` makes a choice's sampling
    from its seed and its `max_tokens`. `prompt_param` and `limit_param` are the fields to name in errors about lengths.
    """

    body: SamplingFields
    prompts: Sequence[Prompt]
    max_tokens: int | None
    sampling: Callable[[int, int], Sampling]
    options: TextOptions
    prompt_param: str
    limit_param: str


class Service:
    """See the module."""

    def __init__(self, config: ClusterConfig, model: ServedModel, fleet: Fleet, metrics: Metrics) -> None:
        self.config = config
        self.model = model
        self.fleet = fleet
        self.metrics = metrics
        self.draining = False
        self._num_open = 0
        self._jobs: set[Job] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def admission(self) -> Iterator[None]:
        """One of the places for open requests.

        Raises:
            Overloaded: all are taken.
            Draining: this proxy is going away.
        """
        limit = self.config.proxy.max_concurrent_requests
        if self.draining:
            raise Draining("this proxy is shutting down")
        if self._num_open >= limit:
            raise Overloaded(f"{limit} requests are open already")
        self._num_open += 1
        self._idle.clear()
        self.metrics.in_flight.set(self._num_open)
        try:
            yield
        finally:
            self._num_open -= 1
            self.metrics.in_flight.set(self._num_open)
            if self._num_open == 0:
                self._idle.set()

    @contextlib.contextmanager
    def running(self, job: Job) -> Iterator[None]:
        """Start `job`; whatever happens inside, nothing of it is left in the workers afterwards."""
        self._jobs.add(job)
        try:
            job.start()
            yield
        finally:
            self._jobs.discard(job)
            job.abort()

    async def drain(self, stop: Stop) -> None:
        """Refuse new requests and wait for the open ones; those that take too long for `stop` end with an error."""
        self.draining = True
        timeout_s = self.config.disagg_cluster.drain_timeout_sec
        if not await drain(log, stop, self._idle.wait(), lambda: self._num_open, timeout_s):
            for job in list(self._jobs):
                job.fail(Draining("this proxy is shutting down"))

    async def read(self, request: web.Request, model: type[Model]) -> Model:
        """The body as `model`.

        Raises:
            RequestError: it is not what it should be, or not all of it came in time.
        """
        if request.content_type != "application/json":
            raise UnsupportedMediaType(f"Content-Type must be application/json, not {request.content_type}")
        try:
            async with asyncio.timeout(_BODY_TIMEOUT_S):
                return await read_body(request, model)
        except TimeoutError:
            raise RequestTimeout(f"the body did not arrive within {_BODY_TIMEOUT_S:.0f} s", "body") from None

    def make_job(self, request_id: str, arrival: float, plan: Plan) -> Job:
        """A job of `n` choices for each prompt, not started yet.

        Raises:
            RequestError: a prompt or a token id is beyond the model's limits.
            NotReady: no workers are connected.
        """
        body, num_choices = plan.body, len(plan.prompts) * (plan.body.n or 1)
        if num_choices > MAX_CHOICES_PER_REQUEST:
            raise LimitExceeded(f"n: at most {MAX_CHOICES_PER_REQUEST} choices a request, {num_choices} asked", "n")
        self.model.check_vocabulary(body.stop_token_ids, "stop_token_ids")
        seeds = choice_seeds(body.seed, body.n or 1)
        deadline = asyncio.get_running_loop().time() + self.config.proxy.request_timeout_s
        stop_ids = frozenset(body.stop_token_ids)
        if not body.ignore_eos:
            stop_ids |= self.model.eos_token_ids
        wake_on_tokens = bool(body.stream) or bool(plan.options.stop)
        job = Job(
            JobContext(self.fleet, self.metrics, self.config.proxy.max_retries, wake_on_tokens), arrival, deadline
        )
        for prompt in plan.prompts:
            max_tokens = self._output_limit(prompt, plan)
            if (body.min_tokens or 0) > max_tokens:
                raise RequestError(f"min_tokens: more than the {max_tokens} tokens allowed", "min_tokens")
            for seed in seeds:
                name = request_id if num_choices == 1 else f"{request_id}-{len(job.choices)}"
                sampling = plan.sampling(seed, max_tokens)
                spec = GenerationSpec(name, prompt.token_ids, sampling, deadline, stop_ids, body.cache_salt or "")
                job.add(prompt, spec, plan.options)
        return job

    def _output_limit(self, prompt: Prompt, plan: Plan) -> int:
        """How many tokens the choices of `prompt` may have."""
        limit, length = self.fleet.max_seq_len(), len(prompt.token_ids)
        if length == 0:
            raise RequestError(f"{plan.prompt_param}: the prompt has no tokens", plan.prompt_param)
        self.model.check_vocabulary(prompt.token_ids, plan.prompt_param)
        if length >= limit:
            raise LimitExceeded(
                f"{plan.prompt_param}: the prompt has {length} tokens; max_seq_len, for prompt and output, is {limit}",
                plan.prompt_param,
            )
        if plan.max_tokens is None:
            return min(limit - length, self.model.defaults.max_tokens or limit)
        if length + plan.max_tokens > limit:
            raise LimitExceeded(
                f"{plan.limit_param}: {plan.max_tokens} tokens after a prompt of {length} exceed the limit of {limit}",
                plan.limit_param,
            )
        return plan.max_tokens

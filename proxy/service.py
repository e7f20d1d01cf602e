"""What all handlers share: the model, the fleet, the limits, and the requests that are open.

Owns the way from a validated request to a `Job`; how much may be open is `admission`'s. Life cycle: serves until
`drain`, which refuses new requests and returns once the open ones have ended; then `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from pdserve.config import ClusterConfig
from pdserve.draining import Stop, drain
from pdserve.errors import ContextLengthExceeded, Draining, LimitExceeded, RequestError, UnsupportedMediaType
from pdserve.http import Model, receive
from pdserve.protocol import Sampling
from pdserve.seeds import choice_seeds
from proxy.admission import Admission, Visit
from proxy.choice import Prompt, TextOptions
from proxy.fleet.fleet import Fleet
from proxy.generation import GenerationSpec
from proxy.job import Job, JobContext
from proxy.metrics import Metrics
from proxy.model import ServedModel
from proxy.schemas.fields import SamplingFields
from proxy.text_work import TextWork, batches
from proxy.time_slice import TimeSlice

log = logging.getLogger(__name__)

MAX_CHOICES_PER_REQUEST = 4096


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
        self.text_work = TextWork()
        self.admission = Admission(config.proxy, metrics.in_flight.set)
        self._jobs: set[Job] = set()

    @property
    def draining(self) -> bool:
        return self.admission.draining

    @contextlib.asynccontextmanager
    async def running(self, job: Job) -> AsyncIterator[None]:
        """Start `job`; whatever happens inside, nothing of it is left in the workers afterwards."""
        self._jobs.add(job)
        try:
            await job.start()
            yield
        finally:
            self._jobs.discard(job)
            job.abort()

    async def drain(self, stop: Stop) -> None:
        """Refuse new requests and wait for the open ones; those that take too long for `stop` end with an error."""
        gate = self.admission
        gate.draining = True
        timeout_s = self.config.disagg_cluster.drain_timeout_sec
        if not await drain(log, stop, gate.wait_idle(), lambda: gate.open_choices, timeout_s):
            for job in list(self._jobs):
                job.fail(Draining("this proxy is shutting down"))

    def close(self) -> None:
        """No request is open any more, and none will come."""
        self.admission.draining = True
        self.text_work.close()

    async def read(self, request: web.Request, model: type[Model], visit: Visit) -> Model:
        """The body as `model`.

        Raises:
            RequestError: it is not what it should be, or not all of it came in time.
            Overloaded: with it, more bytes would be held than may be.
        """
        if request.content_type != "application/json":
            raise UnsupportedMediaType(f"Content-Type must be application/json, not {request.content_type}")
        return await self.text_work.parse(await receive(request, visit.hold_bytes), model)

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool, param: str, visit: Visit, n: int
    ) -> list[list[int]]:
        """`texts` as token ids, for `n` choices each; those of a text that is too long are never made.

        Raises:
            RequestError: there is no tokenizer, or one of them is too long.
            Overloaded: with them, more prompt tokens would be open than may be.
            NotReady: no workers are connected.
        """
        tokenizer, limit = self.model.need_tokenizer(param), self.fleet.max_seq_len()
        found: list[list[int]] = []
        for batch in batches(texts):
            encoded = await self.text_work.encode(tokenizer, batch, add_special_tokens, limit, param)
            for token_ids in encoded:
                check_length(len(token_ids), limit, param)
                visit.hold_tokens(n * len(token_ids), param)
            found += encoded
        return found

    def take_places(self, body: SamplingFields, num_prompts: int, visit: Visit) -> None:
        """Places for all choices of a request.

        Raises:
            LimitExceeded, Overloaded, Draining: there are none.
        """
        choices, param = num_prompts * (body.n or 1), "prompt" if (body.n or 1) == 1 else "n"
        if choices > MAX_CHOICES_PER_REQUEST:
            raise LimitExceeded(f"{param}: at most {MAX_CHOICES_PER_REQUEST} choices a request, {choices} asked", param)
        visit.take(choices, param)

    async def make_job(self, request_id: str, arrival: float, plan: Plan) -> Job:
        """A job of `n` choices for each prompt, not started yet.

        Raises:
            RequestError: a prompt or a token id is beyond the model's limits.
            NotReady: no workers are connected.
        """
        body, num_choices = plan.body, len(plan.prompts) * (plan.body.n or 1)
        self.model.check_vocabulary(body.stop_token_ids, "stop_token_ids")
        seeds = choice_seeds(body.seed, body.n or 1)
        deadline = asyncio.get_running_loop().time() + self.config.proxy.request_timeout_s
        stop_ids = frozenset(body.stop_token_ids)
        if not body.ignore_eos:
            stop_ids |= self.model.eos_token_ids
        wake_on_tokens = bool(body.stream) or bool(plan.options.stop)
        job = Job(JobContext(self.fleet, self.metrics, self.config.proxy, wake_on_tokens), arrival, deadline)
        limit, time_slice = self.fleet.max_seq_len(), TimeSlice()
        for prompt in plan.prompts:
            max_tokens = self._output_limit(prompt, plan, limit)
            if (body.min_tokens or 0) > max_tokens:
                raise RequestError(f"min_tokens: more than the {max_tokens} tokens allowed", "min_tokens")
            for seed in seeds:
                name = request_id if num_choices == 1 else f"{request_id}-{len(job.choices)}"
                sampling = plan.sampling(seed, max_tokens)
                spec = GenerationSpec(name, prompt.token_ids, sampling, deadline, stop_ids, body.cache_salt or "")
                job.add(prompt, spec, plan.options)
                await time_slice.pause()
        return job

    def _output_limit(self, prompt: Prompt, plan: Plan, limit: int) -> int:
        """How many tokens the choices of `prompt` may have; `limit` is for prompt and output."""
        length = len(prompt.token_ids)
        check_length(length, limit, plan.prompt_param)
        self.model.check_vocabulary(prompt.token_ids, plan.prompt_param)
        if plan.max_tokens is None:
            return min(limit - length, self.model.defaults.max_tokens or limit)
        if length + plan.max_tokens > limit:
            raise ContextLengthExceeded(
                f"{plan.limit_param}: {plan.max_tokens} tokens after a prompt of {length} exceed the limit of {limit}",
                plan.limit_param,
            )
        return plan.max_tokens


def check_length(num_tokens: int, limit: int, param: str) -> None:
    """Raises RequestError if a prompt of `num_tokens` leaves no room for output, or is none."""
    if num_tokens == 0:
        raise RequestError(f"{param}: the prompt has no tokens", param)
    if num_tokens >= limit:
        raise ContextLengthExceeded(
            f"{param}: the prompt has {num_tokens} tokens; max_seq_len, for prompt and output, is {limit}", param
        )

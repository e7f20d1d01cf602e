"""The way of a request from its body to a `Job` that is ready to start, the same for every endpoint.

`routes.endpoint` calls `read_body`, makes the plan, and calls `make_job`. In order: the body is read and parsed, a
place is taken for each choice, the prompts become tokens, and each choice gets its seed and its limits. Large texts are
worked on in threads (`text_work`), many choices in slices of time. The request's `Visit` counts bytes, places and
tokens, and refuses what exceeds a limit.
"""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from pdserve.errors import ContextLengthExceeded, LimitExceeded, RequestError, UnsupportedMediaType
from pdserve.http import Model, receive
from pdserve.seeds import choice_seeds
from proxy.admission import Visit
from proxy.generation import GenerationSpec
from proxy.job import Job
from proxy.model import ServedModel
from proxy.plan import Conversation, Plan, Prompt
from proxy.service import Service
from proxy.text_work import batches
from proxy.time_slice import TimeSlice

MAX_CHOICES_PER_REQUEST = 4096

_INLINE_MESSAGES = 32
_INLINE_BYTES = 16 * 1024
"""A conversation of at most so many messages and bytes is rendered in the event loop, and not in a thread."""


async def read_body(service: Service, request: web.Request, schema: type[Model], visit: Visit) -> Model:
    """The body as `schema`.

    Raises:
        RequestError: it does not fit the schema, or not all of it came in time.
        Overloaded: the proxy would hold more bytes than it may.
    """
    if request.content_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type must be application/json, not {request.content_type}")
    return await service.text_work.parse(await receive(request, visit.hold_bytes), schema)


async def make_job(service: Service, plan: Plan, visit: Visit, request_id: str, arrival: float) -> Job:
    """A job of `num_choices` choices for each prompt of `plan`, not started yet.

    Raises:
        RequestError: it asks for another model, for what the model lacks, or beyond its limits.
        Overloaded: more choices or prompt tokens would be open than may be.
        Draining: this proxy is going away.
        NotReady: no workers are connected.
    """
    service.model.check_name(plan.model)
    _take_places(plan, visit)
    prompts = await _tokenized(service, plan, visit)
    job = Job(
        service.fleet,
        service.metrics,
        plan,
        arrival=arrival,
        config=service.config.proxy,
        tokenizer=service.model.tokenizer,
    )
    await _add_choices(job, prompts, service.model, service.fleet.max_seq_len(), request_id)
    return job


def _take_places(plan: Plan, visit: Visit) -> None:
    """Places for all choices. Raises LimitExceeded, Overloaded or Draining: there are none."""
    choices, param = plan.num_prompts * plan.num_choices, plan.prompt_param if plan.num_choices == 1 else "n"
    if choices > MAX_CHOICES_PER_REQUEST:
        raise LimitExceeded(f"{param}: at most {MAX_CHOICES_PER_REQUEST} choices a request, {choices} asked", param)
    visit.take(choices, param)


async def _tokenized(service: Service, plan: Plan, visit: Visit) -> list[Prompt]:
    """The plan's prompts as tokens. A prompt that is certainly too long is refused before it is tokenized."""
    if isinstance(plan.prompts, Conversation):
        service.model.need_tokenizer(plan.prompt_param)
        text = await rendered(service, plan.prompts, visit.body_bytes, plan.prompt_param)
        return list(map(Prompt, await _encoded(service, [text], plan, visit)))
    if plan.stop:
        service.model.need_tokenizer("stop")
    texts = [prompt for prompt in plan.prompts if isinstance(prompt, str)]
    if texts:
        encoded = await _encoded(service, texts, plan, visit)
        return list(map(Prompt, encoded, texts)) if plan.echo else list(map(Prompt, encoded))
    prompts = [Prompt(prompt) for prompt in plan.prompts if not isinstance(prompt, str)]
    _hold([prompt.token_ids for prompt in prompts], service.fleet.max_seq_len(), plan, visit)
    return prompts


async def rendered(service: Service, conversation: Conversation, body_bytes: int, param: str) -> str:
    """The text that the model's chat template makes of `conversation`."""
    template = service.model.template
    if template is None:
        raise RequestError(f"{param}: this model has no chat template", param)

    def render() -> str:
        return template.render(conversation.messages(), conversation.variables, conversation.tools())

    if conversation.num_messages <= _INLINE_MESSAGES and body_bytes <= _INLINE_BYTES:
        return render()
    return await service.text_work.run(body_bytes, render)


async def _encoded(service: Service, texts: Sequence[str], plan: Plan, visit: Visit) -> list[list[int]]:
    param = plan.prompt_param
    tokenizer, limit = service.model.need_tokenizer(param), service.fleet.max_seq_len()
    found: list[list[int]] = []
    for batch in batches(texts):
        encoded = await service.text_work.encode(tokenizer, batch, plan.add_special_tokens, limit, param)
        _hold(encoded, limit, plan, visit)
        found += encoded
    return found


def _hold(prompts: Sequence[list[int]], limit: int, plan: Plan, visit: Visit) -> None:
    """Count the tokens of `prompts` in `visit`, once for each choice.

    Raises:
        RequestError: a prompt is empty, or leaves no room for output within `limit` tokens.
        Overloaded: more prompt tokens would be open than may be.
    """
    for token_ids in prompts:
        _check_length(len(token_ids), limit, plan.prompt_param)
        visit.hold_tokens(plan.num_choices * len(token_ids), plan.prompt_param)


async def _add_choices(job: Job, prompts: Sequence[Prompt], model: ServedModel, limit: int, request_id: str) -> None:
    """Give `job` its choices: `num_choices` for each prompt. `limit` is the most tokens of prompt and output
    together."""
    plan, time_slice = job.plan, TimeSlice()
    ends = plan.sampling(model.defaults, 0, limit)  # seed and length do not change what ends a choice
    model.check_vocabulary(ends.stop_token_ids, "stop_token_ids")
    stop_ids = ends.stop_ids(model.eos_token_ids)
    seeds = choice_seeds(plan.seed, plan.num_choices)
    is_single = len(prompts) * len(seeds) == 1
    for prompt in prompts:
        max_tokens = _output_limit(prompt, plan, model, limit)
        for seed in seeds:
            sampling = plan.sampling(model.defaults, seed, max_tokens)
            if sampling.min_tokens > max_tokens:
                raise RequestError(f"min_tokens: more than the {max_tokens} tokens allowed", "min_tokens")
            name = request_id if is_single else f"{request_id}-{len(job.choices)}"
            spec = GenerationSpec(name, prompt.token_ids, sampling, job.deadline, stop_ids, plan.cache_salt)
            job.add(prompt, spec)
            await time_slice.pause()


def _output_limit(prompt: Prompt, plan: Plan, model: ServedModel, limit: int) -> int:
    """How many tokens the choices of `prompt` may have."""
    length = len(prompt.token_ids)
    _check_length(length, limit, plan.prompt_param)
    model.check_vocabulary(prompt.token_ids, plan.prompt_param)
    if plan.max_tokens is None:
        return min(limit - length, model.defaults.max_tokens or limit)
    if length + plan.max_tokens > limit:
        raise ContextLengthExceeded(
            f"{plan.limit_param}: {plan.max_tokens} tokens after a prompt of {length} exceed the limit of {limit}",
            plan.limit_param,
        )
    return plan.max_tokens


def _check_length(num_tokens: int, limit: int, param: str) -> None:
    """Raises RequestError if a prompt of `num_tokens` leaves no room for output, or is none."""
    if num_tokens == 0:
        raise RequestError(f"{param}: the prompt has no tokens", param)
    if num_tokens >= limit:
        raise ContextLengthExceeded(
            f"{param}: the prompt has {num_tokens} tokens; max_seq_len, for prompt and output, is {limit}", param
        )

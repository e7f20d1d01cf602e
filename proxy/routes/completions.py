"""`POST /v1/completions`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web

from pdserve.errors import RequestError
from pdserve.protocol import Sampling
from pdserve.text.tokenizer import Tokenizer
from proxy.admission import Visit
from proxy.choice import Choice, Piece, Prompt, ScoredToken, TextOptions
from proxy.model import ServedModel
from proxy.routes.answer import answer
from proxy.routes.events import EventFrame
from proxy.routes.request_ids import new_id
from proxy.sampling import to_sampling
from proxy.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from proxy.schemas.usage import UsageInfo
from proxy.service import Plan, Service, check_length

_DEFAULT_MAX_TOKENS = 16
_PLAIN_END = b',"logprobs":null,"finish_reason":null}'
"""What follows the text of a `CompletionChoice` that has nothing else."""


class Completions:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def handle(self, request: web.Request) -> web.StreamResponse:
        service, arrival = self._service, time.perf_counter()
        with service.admission.visit() as visit:
            body = await service.read(request, CompletionRequest, visit)
            service.model.check_name(body.model)
            service.take_places(body, len(body.prompt), visit)
            answer_id = new_id("cmpl")
            job = await service.make_job(answer_id, arrival, await self._plan(body, visit))
            answer_format = CompletionFormat(answer_id, service.model, body)
            return await answer(service, request, job, answer_format, body)

    async def _plan(self, body: CompletionRequest, visit: Visit) -> Plan:
        model = self._service.model
        if body.max_tokens == 0 and not body.echo:
            raise RequestError("max_tokens: 0 is only allowed with echo", "max_tokens")
        if body.stop:
            model.need_tokenizer("stop")
        prompts = await self._prompts(body, visit)
        max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        options = TextOptions(
            tokenizer=model.tokenizer,
            stop=body.stop,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            echo=bool(body.echo),
            logprobs=body.logprobs is not None,
            discard_output=max_tokens == 0,
        )
        return Plan(body, prompts, max(1, max_tokens), self._sampler(body), options, "prompt", "max_tokens")

    def _sampler(self, body: CompletionRequest) -> functools.partial[Sampling]:
        return functools.partial(
            to_sampling,
            body,
            self._service.model.defaults,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )

    async def _prompts(self, body: CompletionRequest, visit: Visit) -> list[Prompt]:
        service, n = self._service, body.n or 1
        texts = [prompt for prompt in body.prompt if isinstance(prompt, str)]
        if texts:
            encoded = await service.encode(texts, body.add_special_tokens is not False, "prompt", visit, n)
            # The text is of use for an echo alone.
            return list(map(Prompt, encoded, texts)) if body.echo else list(map(Prompt, encoded))
        prompts = [Prompt(prompt) for prompt in body.prompt if not isinstance(prompt, str)]
        limit = service.fleet.max_seq_len()
        for prompt in prompts:
            check_length(len(prompt.token_ids), limit, "prompt")
            visit.hold_tokens(n * len(prompt.token_ids), "prompt")
        return prompts


class CompletionFormat:
    """Text completions as JSON."""

    def __init__(self, answer_id: str, model: ServedModel, body: CompletionRequest) -> None:
        self._id = answer_id
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._frame = EventFrame(answer_id, "text_completion", self._created, model.name, body.wants_usage_chunk)
        self._started: set[int] = set()
        self._is_plain = body.logprobs is None and not body.return_token_ids

    def whole(self, choices: Sequence[msgspec.Raw], usage: UsageInfo) -> Completion:
        return Completion(self._id, "text_completion", self._created, self._model.name, choices, usage)

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        if self._is_plain and piece.finish_reason is None:
            return self._frame.text(b'{"index":%d,"text":' % choice.index, piece.text, _PLAIN_END)
        return self._frame.choice(self.choice(choice, piece))

    def usage_chunk(self, usage: UsageInfo) -> bytes:
        return self._frame.usage(usage)

    def choice(self, choice: Choice, piece: Piece) -> CompletionChoice:
        result = CompletionChoice(choice.index, piece.text, self._logprobs(piece.scored), piece.finish_reason)
        if self._body.return_token_ids:
            result.token_ids = piece.token_ids
            if choice.index not in self._started:
                self._started.add(choice.index)
                result.prompt_token_ids = choice.prompt.token_ids
        return result

    def _logprobs(self, scored: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        tokenizer = self._model.tokenizer
        return CompletionLogprobs(
            tokens=[token_text(tokenizer, token.token_id) for token in scored],
            token_logprobs=[token.logprob for token in scored],
            top_logprobs=[_alternatives(tokenizer, token) for token in scored],
            text_offset=[token.text_offset for token in scored],
        )


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """One token as text: its bytes, written out, if they are no text alone; its id if there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _alternatives(tokenizer: Tokenizer | None, token: ScoredToken) -> dict[str, float] | None:
    """The best tokens and the one that was chosen; None where there is no choice (a prompt's first)."""
    if token.logprob is None:
        return None
    ranked = (
        token.top
        if any(token.token_id == other for other, _ in token.top)
        else [
            *token.top,
            (token.token_id, token.logprob),
        ]
    )
    found: dict[str, float] = {}
    for token_id, logprob in ranked:
        found.setdefault(token_text(tokenizer, token_id), logprob)
    return found

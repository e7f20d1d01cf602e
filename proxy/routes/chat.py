"""`POST /v1/chat/completions`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import msgspec
from aiohttp import web

from pdserve.errors import RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.admission import Visit
from proxy.choice import Choice, Piece, Prompt, ScoredToken, TextOptions
from proxy.model import ServedModel
from proxy.routes.answer import answer
from proxy.routes.events import EventFrame
from proxy.routes.request_ids import new_id
from proxy.sampling import to_sampling
from proxy.schemas.chat import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
)
from proxy.schemas.usage import UsageInfo
from proxy.service import Plan, Service

_INLINE_MESSAGES = 32
_INLINE_BYTES = 16 * 1024
"""Up to here a template is rendered in place."""
_PLAIN_END = b'},"logprobs":null,"finish_reason":null}'
"""What follows the text of a choice's event that has nothing else."""


class ChatCompletions:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def handle(self, request: web.Request) -> web.StreamResponse:
        service, arrival = self._service, time.perf_counter()
        with service.admission.visit() as visit:
            body = await service.read(request, ChatCompletionRequest, visit)
            service.model.check_name(body.model)
            service.take_places(body, 1, visit)
            answer_id = new_id("chatcmpl")
            job = await service.make_job(answer_id, arrival, await self._plan(body, visit))
            answer_format = ChatFormat(answer_id, service.model, body)
            return await answer(service, request, job, answer_format, body)

    async def _plan(self, body: ChatCompletionRequest, visit: Visit) -> Plan:
        service = self._service
        model = service.model
        tokenizer = model.need_tokenizer("messages")
        text = await self._render(body, visit.body_bytes)
        # A chat template writes the special tokens itself.
        (token_ids,) = await service.encode([text], bool(body.add_special_tokens), "messages", visit, body.n or 1)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        options = TextOptions(
            tokenizer=tokenizer,
            stop=body.stop,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            logprobs=logprobs is not None,
        )
        sampling = functools.partial(to_sampling, body, model.defaults, logprobs=logprobs)
        limit_param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        return Plan(body, [Prompt(token_ids)], body.token_limit, sampling, options, "messages", limit_param)

    async def _render(self, body: ChatCompletionRequest, body_bytes: int) -> str:
        template = self._service.model.template
        if template is None:
            raise RequestError("messages: this model has no chat template", "messages")

        def render() -> str:
            return template.render([message.for_template() for message in body.messages], body.chat_template_kwargs)

        if len(body.messages) <= _INLINE_MESSAGES and body_bytes <= _INLINE_BYTES:
            return render()
        return await self._service.text_work.run(body_bytes, render)


class ChatFormat:
    """Chat completions as JSON. The first event of a choice is its role."""

    def __init__(self, answer_id: str, model: ServedModel, body: ChatCompletionRequest) -> None:
        self._id = answer_id
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._frame = EventFrame(answer_id, "chat.completion.chunk", self._created, model.name, body.wants_usage_chunk)
        self._started: set[int] = set()
        self._is_plain = not body.logprobs and not body.return_token_ids

    def whole(self, choices: Sequence[msgspec.Raw], usage: UsageInfo) -> ChatCompletion:
        return ChatCompletion(self._id, "chat.completion", self._created, self._model.name, choices, usage)

    def chunk(self, choice: Choice, piece: Piece) -> bytes:
        if self._is_plain and piece.finish_reason is None and choice.index in self._started:
            return self._frame.text(b'{"index":%d,"delta":{"content":' % choice.index, piece.text, _PLAIN_END)
        events = b""
        extra: dict[str, list[int]] = {"token_ids": piece.token_ids} if self._body.return_token_ids else {}
        if choice.index not in self._started:
            self._started.add(choice.index)
            prompt = {"prompt_token_ids": choice.prompt.token_ids} if self._body.return_token_ids else {}
            events = self._event(choice.index, {"role": "assistant", "content": ""}, None, None, prompt)
        logprobs = self._logprobs(piece.scored)
        return events + self._event(choice.index, {"content": piece.text}, logprobs, piece.finish_reason, extra)

    def usage_chunk(self, usage: UsageInfo) -> bytes:
        return self._frame.usage(usage)

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: ChatLogprobs | None,
        finish_reason: str | None,
        extra: dict[str, list[int]],
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason, **extra}
        return self._frame.choice(choice)

    def choice(self, choice: Choice, piece: Piece) -> ChatChoice:
        message = ChatMessage("assistant", piece.text)
        result = ChatChoice(choice.index, message, self._logprobs(piece.scored), piece.finish_reason)
        if self._body.return_token_ids:
            result.token_ids = piece.token_ids
            result.prompt_token_ids = choice.prompt.token_ids
        return result

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        tokenizer = self._model.tokenizer
        if not self._body.logprobs or tokenizer is None:
            return None
        return ChatLogprobs([_chat_logprob(tokenizer, token) for token in scored])


def _chat_logprob(tokenizer: Tokenizer, scored: ScoredToken) -> ChatLogprob:
    assert scored.logprob is not None, "only prompts have tokens without one"
    top = [TopLogprob(*_described(tokenizer, token_id, logprob)) for token_id, logprob in scored.top]
    token, logprob, raw = _described(tokenizer, scored.token_id, scored.logprob)
    return ChatLogprob(token, logprob, raw, top)


def _described(tokenizer: Tokenizer, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode(errors="replace"), logprob, list(raw)

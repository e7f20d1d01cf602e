"""`POST /v1/chat/completions`: what a request asks for, and its answers as JSON."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from pdserve.errors import PdserveError, RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.choice import Choice, Piece, ScoredToken
from proxy.model import ServedModel
from proxy.parsers.scanner import Event, EventKind
from proxy.plan import Conversation, Plan
from proxy.routes.events import DONE, HOLE, EventTemplate, error_event, event
from proxy.routes.message_parts import MessageParts, delta_of, message_of
from proxy.sampling import to_sampling
from proxy.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatEndReason,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    TopLogprob,
)
from proxy.schemas.usage import UsageInfo


def plan_chat(body: ChatCompletionRequest, model: ServedModel) -> Plan:
    """A chat template writes the special tokens itself, so the tokenizer adds none unless it is asked.

    Raises:
        RequestError: there are tools, and nothing knows how this model calls them.
    """
    tools = body.offered_tools
    if tools and model.tools is None:
        raise RequestError("tools: proxy.tool_parser is not set, so this server can't find a model's calls", "tools")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return Plan(
        model=body.model,
        prompts=Conversation(
            len(body.messages),
            lambda: [message.for_template() for message in body.messages],
            body.chat_template_kwargs,
            lambda: [tool.for_template() for tool in tools],
        ),
        sampling=functools.partial(to_sampling, body, logprobs=logprobs),
        num_choices=body.n or 1,
        seed=body.seed,
        max_tokens=body.token_limit,
        cache_salt=body.cache_salt or "",
        add_special_tokens=bool(body.add_special_tokens),
        stream=bool(body.stream),
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        shown_special_ids=model.marker_ids(bool(tools)),
        prompt_param="messages",
        limit_param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )


class ChatFormatter:
    """Chat completions as JSON. The first event of a choice is its role."""

    def __init__(self, answer_id: str, model: ServedModel, body: ChatCompletionRequest) -> None:
        self._id = answer_id
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._is_plain = not body.logprobs and not body.return_token_ids
        self._has_parts = model.reasoning is not None or bool(body.offered_tools)
        self._parts: dict[int, MessageParts] = {}
        self._part_frames: dict[tuple[int, EventKind, int], EventTemplate] = {}
        self._frame = EventTemplate(self._chunk(HOLE))
        self._plain: dict[int, EventTemplate] = {}

    def whole(self, choices: Sequence[Any], usage: UsageInfo) -> ChatCompletion:
        return ChatCompletion(self._id, "chat.completion", self._created, self._model.name, choices, usage)

    def choice(self, choice: Choice, piece: Piece) -> ChatChoice:
        logprobs = self._logprobs(piece.scored)
        message, reason = self._message(choice, piece)
        result = ChatChoice(choice.index, message, logprobs, reason)
        if self._body.return_token_ids:
            result.token_ids = piece.token_ids
            result.prompt_token_ids = choice.prompt.token_ids
        return result

    def news(self, choice: Choice, piece: Piece) -> bytes:
        if self._has_parts:
            return self._news_of_parts(choice, piece)
        plain = self._plain.get(choice.index)
        if plain is not None and self._is_plain and piece.finish_reason is None:
            return plain.fill(piece.text)
        new = ChatChunkChoice(choice.index, ChatDelta(piece.text), self._logprobs(piece.scored), piece.finish_reason)
        if self._body.return_token_ids:
            new.token_ids = piece.token_ids
        events = self._frame.fill(new)
        return events if plain is not None else self._begin(choice) + events

    def end(self, usage: UsageInfo) -> bytes:
        return event(self._chunk(usage=usage)) + DONE if self._body.wants_usage_chunk else DONE

    def error(self, error: PdserveError) -> bytes:
        return error_event(error)

    def _message(self, choice: Choice, piece: Piece) -> tuple[ChatMessage, ChatEndReason | None]:
        if not self._has_parts:
            return ChatMessage("assistant", piece.text), piece.finish_reason
        parts = MessageParts(self._model, self._body, choice)
        return message_of(parts.take(piece)), parts.reason(piece)

    def _news_of_parts(self, choice: Choice, piece: Piece) -> bytes:
        """An event for each part; what is the piece's as a whole stands in the first one, its end in the last."""
        parts = self._parts.get(choice.index)
        events = []
        if parts is None:
            events.append(self._begin(choice))
            parts = self._parts[choice.index] = MessageParts(self._model, self._body, choice)
        taken = parts.take(piece)
        if self._is_plain and piece.finish_reason is None and len(taken) == 1 and taken[0].kind != "name":
            events.append(self._frame_of(choice.index, taken[0].kind, parts.index).fill(taken[0].text))
            return b"".join(events)
        deltas = [parts.delta(each) for each in taken]
        if not deltas and (piece.finish_reason is not None or not self._is_plain):
            deltas.append(ChatDelta())
        for number, delta in enumerate(deltas):
            is_first, is_last = number == 0, number == len(deltas) - 1
            new = ChatChunkChoice(choice.index, delta, None, parts.reason(piece) if is_last else None)
            if is_first:
                new.logprobs = self._logprobs(piece.scored)
            if self._body.return_token_ids:
                new.token_ids = piece.token_ids if is_first else []
            events.append(self._frame.fill(new))
        return b"".join(events)

    def _frame_of(self, index: int, kind: EventKind, call: int) -> EventTemplate:
        """An event with a part of this kind, text to be filled in."""
        frame = self._part_frames.get((index, kind, call))
        if frame is None:
            template = ChatChunkChoice(index, delta_of(Event(kind, HOLE), call), None, None)
            frame = self._part_frames[index, kind, call] = EventTemplate(self._chunk(template))
        return frame

    def _begin(self, choice: Choice) -> bytes:
        first = ChatChunkChoice(choice.index, ChatDelta("", "assistant"), None, None)
        if self._body.return_token_ids:
            first.prompt_token_ids = choice.prompt.token_ids
        template = ChatChunkChoice(choice.index, ChatDelta(HOLE), None, None)
        self._plain[choice.index] = EventTemplate(self._chunk(template))
        return self._frame.fill(first)

    def _chunk(self, *choices: ChatChunkChoice, usage: UsageInfo | None = None) -> ChatCompletionChunk:
        counts = usage if self._body.wants_usage_chunk else UNSET
        return ChatCompletionChunk(self._id, "chat.completion.chunk", self._created, self._model.name, choices, counts)

    def _logprobs(self, scored: Sequence[ScoredToken]) -> ChatLogprobs | None:
        tokenizer = self._model.tokenizer
        if not self._body.logprobs or tokenizer is None:
            return None
        return ChatLogprobs([_chat_logprob(tokenizer, token) for token in scored])


def _chat_logprob(tokenizer: Tokenizer, scored: ScoredToken) -> ChatLogprob:
    assert scored.logprob is not None, "only prompts have tokens without one"
    token, raw = _described(tokenizer, scored.token_id)
    top = []
    for token_id, logprob in scored.top:
        other, other_raw = _described(tokenizer, token_id)
        top.append(TopLogprob(other, logprob, other_raw))
    return ChatLogprob(token, scored.logprob, raw, top)


def _described(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int]]:
    raw = tokenizer.token_bytes(token_id)
    return raw.decode("utf-8", "replace"), list(raw)

"""The parts of one choice's message, as chat completions show them: in one piece, or as deltas of a stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator

from proxy.choice import Choice, Piece
from proxy.model import ServedModel
from proxy.parsers.message import MessageParser
from proxy.parsers.scanner import Event
from proxy.schemas.chat import ChatCompletionRequest, ChatDelta, ChatEndReason, ChatMessage
from proxy.schemas.tools import ToolCall, ToolCallDelta, ToolCallFunction, ToolCallFunctionDelta

_PROMPT_END_TOKENS = 16
"""Where a tag for reasoning may stand, with white space behind it."""


class MessageParts:
    """Takes the pieces of one choice. With `parallel_tool_calls` false, calls after the first are left out.

    `index` is the number of the last call for which there was a delta.
    """

    def __init__(self, model: ServedModel, body: ChatCompletionRequest, choice: Choice) -> None:
        prompt_end = ""
        if model.reasoning is not None and model.tokenizer is not None:
            prompt_end = model.tokenizer.decode(choice.prompt.token_ids[-_PROMPT_END_TOKENS:])
        self._parser = MessageParser(model.tools if body.offered_tools else None, model.reasoning, prompt_end)
        self._has_one_call = body.parallel_tool_calls is False
        self._num_calls = 0
        self.index = -1

    def take(self, piece: Piece) -> list[Event]:
        """What became certain with `piece`; all of it, if it is the last."""
        events = self._parser.push(piece.text)
        if piece.finish_reason is not None:
            events += self._parser.flush()
        return list(self._first_call(events)) if self._has_one_call else events

    def reason(self, piece: Piece) -> ChatEndReason | None:
        """Why the message ended with `piece`, which was taken."""
        return "tool_calls" if piece.finish_reason == "stop" and self._parser.num_calls else piece.finish_reason

    def delta(self, event: Event) -> ChatDelta:
        """`event` in a stream. Each event is asked for once, in order."""
        if event.kind == "name":
            self.index += 1
            first = ToolCallDelta(self.index, ToolCallFunctionDelta("", event.text), _new_id(), "function")
            return ChatDelta(tool_calls=[first])
        return delta_of(event, self.index)

    def _first_call(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self._num_calls += event.kind == "name"
            if event.kind in ("content", "reasoning") or self._num_calls == 1:
                yield event


def delta_of(event: Event, index: int) -> ChatDelta:
    """An event of text in a stream; `index` is the number of the call that it belongs to, if it does."""
    if event.kind == "content":
        return ChatDelta(event.text)
    if event.kind == "reasoning":
        return ChatDelta(reasoning_content=event.text)
    return ChatDelta(tool_calls=[ToolCallDelta(index, ToolCallFunctionDelta(event.text))])


def message_of(events: Iterable[Event]) -> ChatMessage:
    """The message that all of a choice's events make."""
    content, reasoning, calls = "", "", list[ToolCall]()
    for event in events:
        if event.kind == "content":
            content += event.text
        elif event.kind == "reasoning":
            reasoning += event.text
        elif event.kind == "name":
            calls.append(ToolCall(_new_id(), "function", ToolCallFunction(event.text, "")))
        else:
            calls[-1].function.arguments += event.text
    message = ChatMessage("assistant", content or None if calls else content)
    if reasoning:
        message.reasoning_content = reasoning
    if calls:
        message.tool_calls = calls
    return message


def _new_id() -> str:
    """Nine letters and digits: Mistral's templates take no other."""
    return secrets.token_hex(5)[:9]

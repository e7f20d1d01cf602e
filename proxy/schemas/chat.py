"""`POST /v1/chat/completions`: request, answer and stream events (OpenAI API reference, "Chat")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pdserve.errors import RequestError
from proxy.schemas import neutral
from proxy.schemas.fields import EndReason, SamplingFields
from proxy.schemas.request import Request
from proxy.schemas.tools import MAX_TOOLS, Tool, ToolCall, ToolCallDelta, ToolCallOfMessage, ToolChoice
from proxy.schemas.usage import UsageInfo

MAX_MESSAGES = 8192

ChatEndReason = EndReason | Literal["tool_calls"]


if TYPE_CHECKING:
    NeutralFields = Request
    NeutralMessageFields = Request
    NeutralPartFields = Request
else:
    NeutralFields = neutral.fields("NeutralFields", neutral.OF_CHAT)
    NeutralMessageFields = neutral.fields("NeutralMessageFields", neutral.OF_MESSAGES)
    NeutralPartFields = neutral.fields("NeutralPartFields", neutral.OF_TEXT_PARTS)


class TextPart(NeutralPartFields):
    type: Literal["text"]
    text: str


def _as_text(value: Any) -> Any:
    """A message's content: a string, or text parts, which are joined line by line."""
    return "\n".join(map(_text_of, value)) if isinstance(value, list) else value


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise ValueError(f"only parts of type text are supported, got {kind!r}")
    try:
        return TextPart.model_validate(part).text
    except ValidationError as error:
        detail = error.errors()[0]
        raise ValueError(f"a text part's {detail['loc'][0]}: {detail['msg']}") from None


Text = Annotated[str, BeforeValidator(_as_text, json_schema_input_type=str | list[TextPart])]


class Message(NeutralMessageFields):
    """One message. Those of `tool` answer the call with the id `tool_call_id`."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallOfMessage] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _fields_are_those_of_the_role(self) -> Message:
        if self.role != "assistant":
            if self.content is None:
                raise ValueError("content: required")
            for field in ("tool_calls", "reasoning_content"):
                if getattr(self, field):
                    raise ValueError(f"{field}: only of an assistant's message")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: required of a tool's message, and of no other")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        if self.tool_calls:
            message["content"] = self.content  # templates ask whether it is none
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _as_messages(value: Any) -> Any:
    """Counts before anything is made of each of them."""
    if isinstance(value, list) and not value:
        raise ValueError("must not be empty")
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"at most {MAX_MESSAGES} messages are allowed, got {len(value)}")
    return value


class ChatCompletionRequest(SamplingFields, NeutralFields):
    """`chat_template_kwargs` are further variables for the template, such as `enable_thinking`."""

    messages: Annotated[list[Message], BeforeValidator(_as_messages)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
        return self

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens`, its deprecated name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]


class ChatMessage(msgspec.Struct):
    """`content` is null beside calls without any."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    """`token_ids` and `prompt_token_ids` are there when `return_token_ids` asked for them."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEndReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: UsageInfo


class ChatDelta(msgspec.Struct):
    """What is new of a message; `role` stands in a choice's first event."""

    content: str | UnsetType = UNSET
    role: Literal["assistant"] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """`prompt_token_ids` stands in a choice's first event, `token_ids` in the others, when `return_token_ids` asked for
    them."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEndReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct):
    """An event of the stream. The one with the token counts has no choices; it comes when `stream_options` ask for it,
    and then `usage` of the others is null."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: Sequence[ChatChunkChoice]
    usage: UsageInfo | UnsetType | None = UNSET

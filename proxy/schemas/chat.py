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
from proxy.schemas.usage import UsageInfo

MAX_MESSAGES = 8192


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
    """One message; `tool` messages and tool calls need a tool parser, which this server hasn't."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | None = None
    name: str | None = None

    @model_validator(mode="after")
    def _only_assistants_are_silent(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: required")
        return self

    def for_template(self) -> dict[str, str]:
        """What the chat template sees."""
        message = {"role": self.role, "content": self.content or ""}
        return message if self.name is None else {**message, "name": self.name}


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

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs to be true", "top_logprobs")
        return self

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
    role: Literal["assistant"]
    content: str


class ChatChoice(msgspec.Struct):
    """`token_ids` and `prompt_token_ids` are there when `return_token_ids` asked for them."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: EndReason | None
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

    content: str
    role: Literal["assistant"] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct):
    """`prompt_token_ids` stands in a choice's first event, `token_ids` in the others, when `return_token_ids` asked for
    them."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: EndReason | None
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

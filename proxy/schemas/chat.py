"""`POST /v1/chat/completions`: request and answer (OpenAI API reference, "Chat")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from pydantic import BeforeValidator, Field, model_validator

from pdserve.errors import RequestError
from proxy.schemas import neutral
from proxy.schemas.fields import SamplingFields
from proxy.schemas.request import Request
from proxy.schemas.usage import UsageInfo

MAX_MESSAGES = 8192


def _as_text(value: Any) -> Any:
    """A message's content: a string, or text parts, which are joined line by line."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"only parts of type text are supported, got {kind!r}")
        for name, hint in part.items():
            if name in ("type", "text"):
                continue
            if name not in neutral.OF_TEXT_PARTS:
                raise ValueError(f"a text part has no field {name!r}")
            if not neutral.asks_for_nothing(hint, neutral.OF_TEXT_PARTS[name]):
                raise ValueError(f"{name} of a text part is not supported by this server")
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part has a string `text`")
        texts.append(part["text"])
    return "\n".join(texts)


Text = Annotated[str, BeforeValidator(_as_text)]


if TYPE_CHECKING:
    NeutralFields = Request
    NeutralMessageFields = Request
else:
    NeutralFields = neutral.fields("NeutralFields", neutral.OF_CHAT)
    NeutralMessageFields = neutral.fields("NeutralMessageFields", neutral.OF_MESSAGES)


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
    role: str
    content: str


class ChatChoice(msgspec.Struct, omit_defaults=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletion(msgspec.Struct, omit_defaults=True):
    id: str
    object: str
    created: int
    model: str
    choices: Sequence[msgspec.Raw]
    usage: UsageInfo | None = None

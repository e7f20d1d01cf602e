"""`POST /v1/chat/completions`: request and answer (OpenAI API reference, "Chat")."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pdserve.errors import RequestError
from proxy.schemas.fields import Request, SamplingFields, unsupported
from proxy.schemas.usage import UsageInfo


def _as_text(value: Any) -> Any:
    """A message's content: a string, or text parts, which are joined line by line."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"only parts of type text are supported, got {kind!r}")
        if part.keys() != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part has a string `text` and nothing else")
        texts.append(part["text"])
    return "\n".join(texts)


Text = Annotated[str, BeforeValidator(_as_text)]


class Message(Request):
    """One message; `tool` messages and tool calls need a tool parser, which this server hasn't."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | None = None
    name: str | None = None
    refusal: unsupported() = None  # type: ignore[valid-type]
    audio: unsupported() = None  # type: ignore[valid-type]
    tool_calls: unsupported([]) = None  # type: ignore[valid-type]
    function_call: unsupported() = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _only_assistants_are_silent(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: required")
        return self

    def for_template(self) -> dict[str, str]:
        """What the chat template sees."""
        message = {"role": self.role, "content": self.content or ""}
        return message if self.name is None else {**message, "name": self.name}


def _not_empty(messages: list[Message]) -> list[Message]:
    if not messages:
        raise ValueError("must not be empty")
    return messages


class ChatCompletionRequest(SamplingFields):
    """`chat_template_kwargs` are further variables for the template, such as `enable_thinking`."""

    messages: Annotated[list[Message], AfterValidator(_not_empty)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    tools: unsupported([]) = None  # type: ignore[valid-type]
    tool_choice: unsupported("none", "auto") = None  # type: ignore[valid-type]
    functions: unsupported([]) = None  # type: ignore[valid-type]
    function_call: unsupported("none", "auto") = None  # type: ignore[valid-type]
    response_format: unsupported({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: unsupported(["text"]) = None  # type: ignore[valid-type]
    audio: unsupported() = None  # type: ignore[valid-type]
    prediction: unsupported() = None  # type: ignore[valid-type]
    reasoning_effort: unsupported() = None  # type: ignore[valid-type]
    verbosity: unsupported() = None  # type: ignore[valid-type]
    web_search_options: unsupported() = None  # type: ignore[valid-type]

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
    choices: list[ChatChoice]
    usage: UsageInfo | None = None

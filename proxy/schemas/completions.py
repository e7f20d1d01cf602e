"""`POST /v1/completions`: request, answer and stream events (OpenAI API reference, "Completions")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import Field, PlainValidator

from proxy.schemas import neutral
from proxy.schemas.fields import EndReason, SamplingFields, TokenIds, is_token_ids
from proxy.schemas.request import Request
from proxy.schemas.usage import UsageInfo

MAX_PROMPTS = 2048

Prompts = Field(min_length=1, max_length=MAX_PROMPTS)
PromptForms = (
    str | Annotated[list[str], Prompts] | Annotated[TokenIds, Field(min_length=1)] | Annotated[list[TokenIds], Prompts]
)
_PROMPT_FORMS = "must be a string, a list of strings, a list of token ids, or a list of such lists"


def _as_prompts(value: Any) -> list[str | list[int]]:
    """All four forms as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(_PROMPT_FORMS)
    if not value:
        raise ValueError("must not be empty")
    if is_token_ids(value):
        return [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts are allowed, got {len(value)}")
    if not all(isinstance(prompt, str) for prompt in value) and not all(is_token_ids(prompt) for prompt in value):
        raise ValueError(_PROMPT_FORMS)
    return value


if TYPE_CHECKING:
    NeutralFields = Request
else:
    NeutralFields = neutral.fields("NeutralFields", neutral.OF_COMPLETIONS)


class CompletionRequest(SamplingFields, NeutralFields):
    prompt: Annotated[list[str | list[int]], PlainValidator(_as_prompts, json_schema_input_type=PromptForms)]
    max_tokens: int | None = Field(default=None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one entry a token. `text_offset` counts characters from the start of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """`token_ids` and `prompt_token_ids` are there when `return_token_ids` asked for them. In a stream, `text` is what
    is new, and `prompt_token_ids` stands in a choice's first event."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: EndReason | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(msgspec.Struct):
    """An answer, or an event of a stream. The event with the token counts has no choices; it comes when
    `stream_options` ask for it, and then `usage` of the others is null."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: Sequence[CompletionChoice]
    usage: UsageInfo | UnsetType | None = UNSET

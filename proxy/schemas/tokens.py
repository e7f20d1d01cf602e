"""`POST /tokenize` and `POST /detokenize`: requests and answers, in vLLM's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from msgspec import UNSET, UnsetType
from pydantic import ConfigDict, Field, PlainValidator, model_validator
from pydantic.config import JsonDict

from pdserve.errors import RequestError
from proxy.schemas import neutral
from proxy.schemas.chat import MAX_MESSAGES, Message
from proxy.schemas.fields import TokenIds, is_token_ids
from proxy.schemas.request import Request

if TYPE_CHECKING:
    NeutralFields = Request
else:
    NeutralFields = neutral.fields("NeutralTokenizeFields", neutral.OF_TOKENIZE)

_ONE_OF_BOTH: JsonDict = {
    "oneOf": [
        {
            "required": ["prompt"],
            "properties": {
                "prompt": {"type": "string"},
                "messages": {"type": "null"},
                "add_generation_prompt": {"type": "null"},
                "chat_template_kwargs": {"type": "null"},
            },
        },
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
}


def _as_tokens(value: Any) -> list[int]:
    if not is_token_ids(value):
        raise ValueError("must be a list of non-negative integers")
    return list(value)


class TokenizeRequest(NeutralFields):
    """A `prompt`, or the `messages` of a conversation. By default special tokens are added to a prompt and not to a
    conversation, whose template writes its own; the template asks for the assistant's next message unless
    `add_generation_prompt` is false."""

    model_config = ConfigDict(json_schema_extra=_ONE_OF_BOTH)

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _is_one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt: either prompt or messages is needed, and not both", "prompt")
        for field in ("add_generation_prompt", "chat_template_kwargs"):
            if self.messages is None and getattr(self, field) is not None:
                raise RequestError(f"{field}: only allowed with messages", field)
        return self

    @property
    def param(self) -> str:
        """The field that holds the text."""
        return "messages" if self.prompt is None else "prompt"


class Tokenized(msgspec.Struct):
    """`max_model_len` is how many tokens a request may have, prompt and output together. `token_strs`, the vocabulary's
    entries, are there when `return_token_strs` asked for them."""

    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: Sequence[str] | UnsetType = UNSET


class DetokenizeRequest(Request):
    model: str | None = None
    tokens: Annotated[list[int], PlainValidator(_as_tokens, json_schema_input_type=TokenIds)]


class Detokenized(msgspec.Struct):
    prompt: str

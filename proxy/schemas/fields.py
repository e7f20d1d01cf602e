"""Field types and sampling fields that completions and chat share.

What the API has and this server hasn't is refused by name, unless its value asks for nothing (`neutral`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from pdserve.errors import RequestError
from proxy.schemas import neutral
from proxy.schemas.request import Request

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


def _as_stop_strings(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, list) or not all(isinstance(stop, str) for stop in strings):
        raise ValueError("must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings are allowed, got {len(strings)}")
    if "" in strings:
        raise ValueError("a stop string must not be empty")
    return tuple(strings)


def _as_token_ids(value: Any) -> Any:
    if value is None:
        return ()
    if not is_token_ids(value):
        raise ValueError("must be a list of non-negative integers")
    return tuple(value)


def is_token_ids(value: Any) -> bool:
    """Whether `value` is a list of integers from 0 on; an empty one is."""
    return isinstance(value, list) and set(map(type, value)) <= {int} and (not value or min(value) >= 0)


EndReason = Literal["stop", "length"]
"""Why a choice ended."""
TokenIds = list[Annotated[int, Field(ge=0)]]
StopString = Annotated[str, Field(min_length=1)]
StopForms = StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)] | None
StopStringsField = Annotated[tuple[str, ...], BeforeValidator(_as_stop_strings, json_schema_input_type=StopForms)]
TokenIdsField = Annotated[tuple[int, ...], BeforeValidator(_as_token_ids, json_schema_input_type=TokenIds | None)]


if TYPE_CHECKING:
    NeutralFields = Request
else:
    NeutralFields = neutral.fields("NeutralFields", neutral.OF_BOTH)


class StreamOptions(Request):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(NeutralFields):
    """What both endpoints take; null means the default everywhere.

    Below OpenAI's own fields stand the extensions, named as in vLLM and TensorRT-LLM.
    """

    model: str
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: StopStringsField = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    best_of: int | None = None

    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: TokenIdsField = ()
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None

    @model_validator(mode="after")
    def _best_of_is_n(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of: only best_of equal to n is supported", "best_of")
        return self

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

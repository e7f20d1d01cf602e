"""Field types and sampling fields that completions and chat share.

Types are strict: a bool is not an integer and "5" is not 5. What the API has and this server hasn't is refused by
name, unless its value asks for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_STOP_STRINGS = 16
MAX_CHOICES = 128


def unsupported(*neutral: Any) -> Any:
    """A field type that only takes null and the `neutral` values, which mean the same as leaving it out."""

    def check(value: Any) -> None:
        if value is not None and not any(type(value) is type(allowed) and value == allowed for allowed in neutral):
            raise ValueError("not supported by this server")

    return Annotated[Any, BeforeValidator(check)]


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


StopStringsField = Annotated[tuple[str, ...], BeforeValidator(_as_stop_strings)]
TokenIdsField = Annotated[tuple[int, ...], BeforeValidator(_as_token_ids)]


class Request(BaseModel):
    """Strict, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Request):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingFields(Request):
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
    logit_bias: unsupported({}) = None  # type: ignore[valid-type]

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

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

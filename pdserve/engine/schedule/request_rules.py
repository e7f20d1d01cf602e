"""Checks every field of a request before the engine takes it up, for all hosts of an engine.

`Engine.submit` calls it. Owns the type and the range of every field; knows nothing of what the engine is doing. A
request that passes can't make a step fail by its values: its token ids are in the vocabulary, and the sampler accepts
its sampling fields. The checks are needed here: a worker's socket guarantees types but no ranges, and the Python API
guarantees neither.
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pdserve.errors import RequestError
from pdserve.protocol import EngineLimits, GenerateRequest, Key
from pdserve.sampling_rules import MAX_STOP_TOKEN_IDS, SAMPLING_RULES, TRUE_OR_FALSE, Rule

_TEXT = Rule("text", str)
_KEY_RULES = {"request_id": _TEXT, "attempt": Rule("an integer from 0", Annotated[int, Meta(ge=0)])}
_SECONDS = Rule("a number of seconds above 0, at most 1e9", Annotated[float, Meta(gt=0, le=1e9)])


class RequestRules:
    """The rules of an engine with these limits. A request that keeps them costs a few microseconds and 8 ns a token."""

    def __init__(self, limits: EngineLimits) -> None:
        vocabulary = f"the vocabulary of {limits.vocab_size} tokens"
        self._vocabulary = vocabulary
        token: Any = Annotated[int, Meta(ge=0, lt=limits.vocab_size)]
        self._token = Rule(f"a token id in {vocabulary}", token)
        self._fields = {
            "token_ids": Rule(f"a list of token ids in {vocabulary}", list[token]),
            "num_prompt_tokens": Rule("an integer from 1", Annotated[int, Meta(ge=1)]),
            "timeout_s": _SECONDS,
            "cache_salt": _TEXT,
            "kv_only": TRUE_OR_FALSE,
            "evict": TRUE_OR_FALSE,
        }
        stop_ids = Annotated[tuple[token, ...], Meta(max_length=MAX_STOP_TOKEN_IDS)]
        stops = Rule(f"at most {MAX_STOP_TOKEN_IDS} token ids in {vocabulary}", stop_ids)
        self._sampling_fields = {**SAMPLING_RULES, "stop_token_ids": stops}
        self._key_shape = _shape("Key", _KEY_RULES)
        sampling = Rule("sampling", _shape("Sampling", self._sampling_fields))
        self._shape = _shape("Request", {**self._fields, "sampling": sampling})

    def check_key(self, key: Key) -> None:
        """Raises `RequestError` unless `key` can name a request."""
        try:
            msgspec.convert(key, self._key_shape, from_attributes=True)
            key.request_id.encode()
        except (msgspec.ValidationError, UnicodeEncodeError):
            _blame(key, _KEY_RULES)
            raise RequestError("request_id: not valid Unicode", "request_id") from None

    def check(self, request: GenerateRequest) -> None:
        """Whether the request makes sense at all. Raises `RequestError` naming the field."""
        if not request.token_ids:
            raise RequestError("the prompt is empty", "token_ids")
        try:
            msgspec.convert(request, self._shape, from_attributes=True)
            request.cache_salt.encode()
        except (msgspec.ValidationError, UnicodeEncodeError):
            self._explain(request)
        sampling, num_tokens = request.sampling, len(request.token_ids)
        if request.num_prompt_tokens > num_tokens:
            message = f"num_prompt_tokens is {request.num_prompt_tokens} with {num_tokens} tokens"
            raise RequestError(message, "num_prompt_tokens")
        if sampling.min_tokens > sampling.max_tokens:
            message = f"min_tokens, {sampling.min_tokens}, is more than max_tokens, {sampling.max_tokens}"
            raise RequestError(message, "min_tokens")

    def _explain(self, request: GenerateRequest) -> None:
        """Raise the error of the first field that breaks its rule."""
        token_ids: Any = request.token_ids
        if isinstance(token_ids, list):
            for at, token_id in enumerate(token_ids):
                if not self._token.allows(token_id):
                    raise RequestError(self._complain(at, token_id), "token_ids")
        _blame(request, self._fields)
        _blame(request.sampling, self._sampling_fields)
        raise RequestError("cache_salt: not valid Unicode", "cache_salt")

    def _complain(self, at: int, token_id: object) -> str:
        if type(token_id) is int:
            return f"token id {reprlib.repr(token_id)} is not in {self._vocabulary}"
        return f"token_ids[{at}]: expected {self._token.words}, got {reprlib.repr(token_id)}"


def _shape(name: str, rules: dict[str, Rule]) -> type[msgspec.Struct]:
    return msgspec.defstruct(name, [(field, rule.type) for field, rule in rules.items()])


def _blame(value: object, rules: dict[str, Rule]) -> None:
    for field, rule in rules.items():
        found = getattr(value, field, None)
        if not rule.allows(found):
            raise RequestError(f"{field}: expected {rule.words}, got {reprlib.repr(found)}", field)

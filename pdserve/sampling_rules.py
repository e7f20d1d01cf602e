"""What each field of `Sampling` may be: one rule a field, for the Python API and for every host of an engine.

A value outside its rule could make a step fail that other requests share. The proxy's schemas are narrower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from pdserve.seeds import SEED_BITS

# The host writes out every alternative of every token, at 0.15 us each, while all requests of the step wait.
MAX_LOGPROBS = 20
# `min_tokens` bans each of them in each step.
MAX_STOP_TOKEN_IDS = 1024

LARGEST_TOP_K = (1 << 31) - 1
# Beyond, float32 arithmetic of a row would overflow.
_LARGEST_FACTOR = 1e6


@dataclass(frozen=True, slots=True)
class Rule:
    """What is allowed: in `words`, and as a type of msgspec's."""

    words: str
    type: Any

    def allows(self, value: object) -> bool:
        try:
            msgspec.convert(value, self.type)
        except msgspec.ValidationError:
            return False
        return True


def integer_rule(least: int, most: int | None = None, *, optional: bool = False) -> Rule:
    bound = "" if most is None else f" to {most}"
    kind: Any = Annotated[int, Meta(ge=least, le=most)]
    words = f"an integer from {least}{bound}" if bound else f"an integer of at least {least}"
    return Rule(words, kind | None if optional else kind)


def _number(least: float, most: float) -> Rule:
    return Rule(f"a number from {least:g} to {most:g}", Annotated[float, Meta(ge=least, le=most)])


_PENALTY = _number(-2, 2)
_LOGPROBS = integer_rule(0, MAX_LOGPROBS, optional=True)
TRUE_OR_FALSE = Rule("true or false", bool)

SAMPLING_RULES: dict[str, Rule] = {
    "seed": Rule(f"an integer from 0 to 2**{SEED_BITS} - 1", Annotated[int, Meta(ge=0, le=(1 << SEED_BITS) - 1)]),
    "max_tokens": integer_rule(1),
    "min_tokens": integer_rule(0),
    "temperature": _number(0, _LARGEST_FACTOR),
    "top_p": Rule("a number above 0, at most 1", Annotated[float, Meta(gt=0, le=1)]),
    "top_k": integer_rule(0, LARGEST_TOP_K),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(1 / _LARGEST_FACTOR, _LARGEST_FACTOR),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "stop_token_ids": Rule(
        f"at most {MAX_STOP_TOKEN_IDS} token ids",
        Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=MAX_STOP_TOKEN_IDS)],
    ),
    "ignore_eos": TRUE_OR_FALSE,
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
}

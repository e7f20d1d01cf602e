"""`SamplingParams`: what a user of the Python API may ask of sampling. Names and defaults are TensorRT-LLM's."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from pdserve.errors import RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import Sampling
from pdserve.sampling_rules import SAMPLING_RULES, TRUE_OR_FALSE, Rule
from pdserve.seeds import choice_seed

_STRINGS = Annotated[str, Meta(min_length=1)]
# None is allowed for every field whose default is None.
_ALLOWED: dict[str, Rule] = {
    **SAMPLING_RULES,
    "n": Rule("an integer of at least 1", Annotated[int, Meta(ge=1)]),
    "top_p": Rule("a number from 0 to 1", Annotated[float, Meta(ge=0, le=1)]),
    "stop": Rule("a string or strings, none of them empty", _STRINGS | tuple[_STRINGS, ...]),
    "skip_special_tokens": TRUE_OR_FALSE,
    "include_stop_str_in_output": TRUE_OR_FALSE,
}
_OPTIONAL = {"temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "min_tokens"} | {
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to pick tokens, and when to stop.

    None leaves a thing at what the model's `generation_config.json` says, else at its neutral value. Sampling is greedy
    when `temperature` is 0, `top_p` is 0 or `top_k` is 1, and also when nobody says anything of the three. `top_k` 0
    keeps every token. Without a `seed` each call draws its own; the first of `n` outputs uses it, and each other one a
    seed that is hashed from it, as over HTTP (`seeds.choice_seed`). No stop string is looked for in the text of the
    first `min_tokens` tokens. `logprobs` asks for the chosen token's log-probability and that many alternatives,
    at most 20; `prompt_logprobs` likewise.

    Raises:
        RequestError: a value is not allowed; `param` names the field.
    """

    max_tokens: int = 32
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for field, rule in _ALLOWED.items():
            value = getattr(self, field)
            if not (value is None and field in _OPTIONAL) and not rule.allows(value):
                raise RequestError(f"{field}: expected {rule.words}, got {reprlib.repr(value)}", field)
        if (self.min_tokens or 0) > self.max_tokens:
            message = f"min_tokens, {self.min_tokens}, is more than max_tokens, {self.max_tokens}"
            raise RequestError(message, "min_tokens")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def to_sampling(self, seed: int, index: int = 0, defaults: GenerationDefaults | None = None) -> Sampling:
        """The engine's form for output `index`.

        Args:
            seed: used where this object has none; see `seeds.new_seed`.
            defaults: the model's own, for what is None here.
        """
        base = seed if self.seed is None else self.seed
        chosen = (defaults or GenerationDefaults()).under(self, self.max_tokens)
        return Sampling(
            seed=choice_seed(base, index),
            max_tokens=self.max_tokens,
            min_tokens=chosen.min_tokens or 0,
            temperature=0.0 if _is_greedy(chosen) else _default(chosen.temperature, 1.0),
            top_p=_default(chosen.top_p or None, 1.0),
            top_k=chosen.top_k or 0,
            min_p=_default(chosen.min_p, 0.0),
            repetition_penalty=_default(chosen.repetition_penalty, 1.0),
            presence_penalty=_default(chosen.presence_penalty, 0.0),
            frequency_penalty=_default(chosen.frequency_penalty, 0.0),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs if index == 0 else None,
        )


def _is_greedy(chosen: GenerationDefaults) -> bool:
    unset = chosen.temperature is None and chosen.top_p is None and chosen.top_k is None
    return unset or chosen.temperature == 0 or chosen.top_p == 0 or chosen.top_k == 1


def _default(value: float | None, neutral: float) -> float:
    return neutral if value is None else float(value)

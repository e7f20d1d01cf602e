"""`SamplingParams`: what a user of the Python API may ask of sampling. Names and defaults are TensorRT-LLM's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.errors import RequestError
from pdserve.generation_defaults import GenerationDefaults
from pdserve.protocol import Sampling
from pdserve.seeds import SEED_BITS, choice_seed


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What is allowed, in words and as a test. None is allowed for every field whose default is None.
_ALLOWED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_tokens": ("an integer of at least 1", lambda v: _is_int(v) and v >= 1),
    "n": ("an integer of at least 1", lambda v: _is_int(v) and v >= 1),
    "temperature": ("a number from 0", lambda v: _is_number(v) and 0 <= v < float("inf")),
    "top_p": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "top_k": ("an integer from 0", lambda v: _is_int(v) and v >= 0),
    "min_p": ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "seed": (f"an integer from 0 to 2**{SEED_BITS} - 1", lambda v: _is_int(v) and 0 <= v < 1 << SEED_BITS),
    "min_tokens": ("an integer from 0", lambda v: _is_int(v) and v >= 0),
    "repetition_penalty": ("a number above 0", lambda v: _is_number(v) and 0 < v < float("inf")),
    "presence_penalty": ("a number from -2 to 2", lambda v: _is_number(v) and -2 <= v <= 2),
    "frequency_penalty": ("a number from -2 to 2", lambda v: _is_number(v) and -2 <= v <= 2),
    "logprobs": ("an integer from 0", lambda v: _is_int(v) and v >= 0),
    "prompt_logprobs": ("an integer from 0", lambda v: _is_int(v) and v >= 0),
    "stop": (
        "a string or strings, none of them empty",
        lambda v: bool(v) if isinstance(v, str) else all(isinstance(each, str) and each for each in v),
    ),
    "stop_token_ids": ("token ids", lambda v: not isinstance(v, str) and all(_is_int(each) for each in v)),
    "ignore_eos": ("true or false", lambda v: isinstance(v, bool)),
    "skip_special_tokens": ("true or false", lambda v: isinstance(v, bool)),
    "include_stop_str_in_output": ("true or false", lambda v: isinstance(v, bool)),
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
    first `min_tokens` tokens. `logprobs` asks for the chosen token's log-probability and that many alternatives.

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
        for field, (allowed, is_allowed) in _ALLOWED.items():
            value = getattr(self, field)
            if value is None and field in _OPTIONAL:
                continue
            try:
                accepted = value is not None and is_allowed(value)
            except TypeError:
                accepted = False
            if not accepted:
                raise RequestError(f"{field}: expected {allowed}, got {value!r}", field)

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

"""What `generation_config.json` says of generating: the values of fields that a request leaves out.

Owns the list of that file's fields. One that changes the output is honoured or refused by name at start, as is one
that is not known and asks for something; the rest is bookkeeping and passes. Proxy and Python API fill in requests
with the same function, `GenerationDefaults.under`. Reading the file is `pdserve.model_store`'s business.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.errors import ConfigError
from pdserve.sampling_rules import LARGEST_TOP_K, SAMPLING_RULES, Rule, integer_rule


class Asked(Protocol):
    """What a request says itself; None is left out."""

    @property
    def temperature(self) -> float | None: ...
    @property
    def top_p(self) -> float | None: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float | None: ...
    @property
    def presence_penalty(self) -> float | None: ...
    @property
    def frequency_penalty(self) -> float | None: ...
    @property
    def min_tokens(self) -> int | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What the model's authors recommend, and what ends its output; None where they say nothing.

    `temperature` 0 stands for `do_sample: false`, `top_k` 0 keeps every token. `max_tokens` is no limit, but what a
    chat gets that asks for no number; where an API has a default of its own, that stands.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None

    def under(self, asked: Asked, max_tokens: int) -> GenerationDefaults:
        """These defaults with what a request asked laid on top. `max_tokens` is the request's own, and final."""
        said = {name: getattr(asked, name) for name in _ASKED}
        chosen = dataclasses.replace(
            self, **{name: value for name, value in said.items() if value is not None}, max_tokens=max_tokens
        )
        if asked.min_tokens is None and chosen.min_tokens is not None and chosen.min_tokens > max_tokens:
            return dataclasses.replace(chosen, min_tokens=max_tokens)
        return chosen


_ASKED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "min_tokens",
)  # fmt: skip


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# The file's name of a field: ours, and what is allowed.
_HONOURED: dict[str, tuple[str, Rule]] = {
    **{name: (name, SAMPLING_RULES[name]) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
    **{name: (name, SAMPLING_RULES[name]) for name in ("presence_penalty", "frequency_penalty")},
    "top_k": ("top_k", integer_rule(-1, LARGEST_TOP_K)),
    "min_new_tokens": ("min_tokens", SAMPLING_RULES["min_tokens"]),
    "max_new_tokens": ("max_tokens", SAMPLING_RULES["max_tokens"]),
}

# Fields that change the output and are not implemented, with the values that ask for nothing. So do null and [].
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "min_length": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "bad_words_ids": (),
    "force_words_ids": (),
    "constraints": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": (),
    "sequence_bias": (),
    "stop_strings": (),
    "exponential_decay_length_penalty": (),
    "watermarking_config": (),
    "dola_layers": (),
    "max_time": (),
    "token_healing": (),
}

# Fields that leave this server's output as it is. `length_penalty` and `early_stopping` belong to beams, the
# assistant's fields to speculation. `max_length` counts the prompt; how long a sequence may be is `max_seq_len`.
_BOOKKEEPING = frozenset(
    {
        "_commit_hash", "_from_model_config", "transformers_version", "transformers.js_config", "chat_format",
        "bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "length_penalty", "early_stopping",
        "renormalize_logits", "remove_invalid_values", "use_cache", "use_mtp", "cache_implementation", "cache_config",
        "max_cache_len", "return_legacy_cache", "return_dict_in_generate", "output_attentions",
        "output_hidden_states", "output_scores", "output_logits", "is_assistant", "num_assistant_tokens",
        "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size",
    }
)  # fmt: skip

FIELDS = frozenset({*_HONOURED, *_NEUTRAL, *_BOOKKEEPING, "do_sample", "eos_token_id"})
"""Every field that is known here."""

# What old `config.json` files repeat although nobody chose it: the defaults of that time's configuration class.
_OLD_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def parse(data: Mapping[str, Any], source: str) -> GenerationDefaults:
    """From the fields of `generation_config.json`; `source` names the file in errors.

    Raises:
        ConfigError: a field is malformed, or asks for what is not implemented; the message names it.
    """
    for name, value in data.items():
        _check(name, value, source)
    fields: dict[str, Any] = {ours: data[name] for name, (ours, _) in _HONOURED.items() if data.get(name) is not None}
    if "top_k" in fields:
        fields["top_k"] = max(0, fields["top_k"])
    do_sample = data.get("do_sample")
    if do_sample is not None and not isinstance(do_sample, bool):
        raise _error(source, f"do_sample: expected true or false, got {do_sample!r}")
    if do_sample is False:
        fields["temperature"] = 0.0
    elif do_sample:
        fields.setdefault("temperature", 1.0)
    return GenerationDefaults(eos_token_ids=eos_token_ids(data, source), **fields)


def from_model_config(data: Mapping[str, Any]) -> dict[str, Any]:
    """The generation fields that an old `config.json` holds, for a folder without `generation_config.json`."""
    return {
        name: value
        for name, value in data.items()
        if name in FIELDS and name not in _BOOKKEEPING and not (name in _OLD_DEFAULTS and value == _OLD_DEFAULTS[name])
    }


def eos_token_ids(data: Mapping[str, Any], source: str) -> tuple[int, ...]:
    """`eos_token_id`, a number or a list of numbers. Raises ConfigError."""
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_int(token) for token in ids):
        raise _error(source, f"eos_token_id must be a number or a list of numbers, got {value!r}")
    return tuple(sorted(set(ids)))


def _check(name: str, value: Any, source: str) -> None:
    if value is None or name in _BOOKKEEPING or name in ("do_sample", "eos_token_id"):
        return
    if name in _HONOURED:
        _, rule = _HONOURED[name]
        if not rule.allows(value):
            raise _error(source, f"{name}: expected {rule.words}, got {value!r}")
        return
    if value is False or value == [] or any(value == neutral for neutral in _NEUTRAL.get(name, ())):
        return
    raise _error(source, f"{name}: {value!r} is not supported; remove the field")


def _error(source: str, message: str) -> ConfigError:
    return ConfigError(f"{source}: {message}", "model")

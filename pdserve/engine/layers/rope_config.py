"""Rotary embedding as `config.json` describes it, and how long a sequence it makes possible.

Owns the reading of `rope_parameters` (transformers 5) and of `rope_theta` beside `rope_scaling` (before). As
elsewhere, a key that would change the angles is honoured or refused by name. The formulas are `layers.rope`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdserve.model_fields import count, error, flag, number

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` and what follows belong to the scaled kinds; see `layers.rope` for the formulas.

    `max_positions` is the longest sequence that the angles are made for. `divisors` has one entry a pair of dimensions.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    divisors: tuple[float, ...] = ()


def parse_rope(data: Mapping[str, Any]) -> RopeConfig:
    """From a whole `config.json`. Raises ConfigError."""
    key = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    scaling, older = data.get(key) or {}, data.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise error(key, "one flat mapping for all layers was expected")
    # transformers would take the older one, and with it another rope_theta.
    if older is not scaling and older != {name: scaling.get(name) for name in older}:
        raise error(
            "rope_scaling", "differs from rope_parameters, which is given as well and has a place for all of it"
        )
    theta = number({"rope_theta": data.get("rope_theta"), **scaling}, "rope_theta", 10_000.0)
    partial = {"partial_rotary_factor": data.get("partial_rotary_factor"), **scaling}
    if number(partial, "partial_rotary_factor", 1.0) != 1.0:
        raise error("partial_rotary_factor", "allowed: 1.0")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in _KINDS:
        raise error(f"{key}.rope_type", f"allowed: {', '.join(_KINDS)}; got {kind}")
    known, parse = _KINDS[kind]
    for name, value in scaling.items():
        if name not in _COMMON and name not in known and value not in (None, False):
            raise error(f"{key}.{name}", f"not supported for {kind}, got {value!r}")
    return parse(data, scaling, theta)


def _default(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    if number(scaling, "factor", 1.0) != 1.0:
        raise error("factor", f"a factor of {scaling['factor']} needs a rope_type")
    return RopeConfig(theta, max_positions=count(data, "max_position_embeddings"))


def _linear(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    factor = number(scaling, "factor")
    longest = _extended(data, _original_max_position(data, scaling), factor)
    return RopeConfig(theta, "linear", factor, max_positions=longest)


def _dynamic(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    """Angles depend on the sequence's length, but not up to `max_position_embeddings`, which is what is supported.

    Beyond that, keys that are in the cache, or are another request's, would have to be turned again with each token.
    """
    return RopeConfig(theta, "dynamic", number(scaling, "factor"), max_positions=count(data, "max_position_embeddings"))


def _llama3(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    """`factor` is of wavelengths, not of the length: Llama 3.1 has 8 for 16 times its original length, 3.2 has 32."""
    return RopeConfig(
        theta,
        "llama3",
        number(scaling, "factor"),
        original_max_position=_original_max_position(data, scaling),
        max_positions=count(data, "max_position_embeddings"),
        low_freq_factor=number(scaling, "low_freq_factor"),
        high_freq_factor=number(scaling, "high_freq_factor"),
    )


def _yarn(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    def optional(key: str) -> float | None:
        return number(scaling, key) if scaling.get(key) else None

    original = _original_max_position(data, scaling)
    factor = number(scaling, "factor", count(data, "max_position_embeddings") / original)
    return RopeConfig(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        max_positions=_extended(data, original, factor),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=flag(scaling, "truncate", True),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )


def _longrope(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    """One divisor a pair of dimensions. Two lists, between which the length of the batch decides, are not supported."""
    divisors, short = scaling.get("long_factor"), scaling.get("short_factor")
    if not isinstance(divisors, list) or not all(isinstance(each, int | float) and each > 0 for each in divisors):
        raise error("long_factor", "a list of positive numbers was expected")
    if divisors != short:
        raise error("short_factor", "longrope with a short_factor unlike its long_factor is not supported")
    original, longest = _original_max_position(data, scaling), count(data, "max_position_embeddings")
    return RopeConfig(
        theta,
        "longrope",
        number(scaling, "factor", longest / original),
        original_max_position=original,
        max_positions=longest,
        attention_factor=None if scaling.get("attention_factor") is None else number(scaling, "attention_factor"),
        divisors=tuple(float(each) for each in divisors),
    )


def _original_max_position(data: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    """What the model was made for before its angles were scaled. The field outside the mapping comes first, as in
    transformers."""
    inner = count(scaling, "original_max_position_embeddings", count(data, "max_position_embeddings"))
    return count(data, "original_max_position_embeddings", inner)


def _extended(data: Mapping[str, Any], original: int, factor: float) -> int:
    """`max_position_embeddings` may or may not have been raised when the scaling was added."""
    return max(count(data, "max_position_embeddings"), int(original * factor))


# "finetuned" says how the weights came to be.
_COMMON = frozenset(
    {
        "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
        "finetuned",
    }
)  # fmt: skip
_YARN = frozenset({"beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"})
_Parse = Callable[[Mapping[str, Any], Mapping[str, Any], float], RopeConfig]
_KINDS: dict[str, tuple[frozenset[str], _Parse]] = {
    "default": (frozenset(), _default),
    "linear": (frozenset(), _linear),
    "dynamic": (frozenset(), _dynamic),
    "llama3": (frozenset({"low_freq_factor", "high_freq_factor"}), _llama3),
    "yarn": (_YARN, _yarn),
    "longrope": (frozenset({"long_factor", "short_factor", "attention_factor"}), _longrope),
}

"""What the engine must know of a model, read from Hugging Face's `config.json`.

Owns the mapping from the families' configuration files to one description, and the refusal of everything that the
decoder does not implement: a field that would change the model's output is honoured or is an error, never skipped.
Not here: reading files (`pdserve.model_store`), the decoder itself (`pdserve.engine.models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pdserve.errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture fixes and its `config.json` does not say."""

    qkv_bias: bool = False
    bias_key: str | None = None  # the field that gives all four attention projections a bias
    mlp_bias_key: str | None = None
    qk_norm: bool = False
    head_dim: int | None = None  # what a missing `head_dim` means; None: hidden_size / num_attention_heads
    heads_default: bool = False  # whether a missing `num_key_value_heads` means `num_attention_heads`
    window_default: int | None = None  # what a missing `sliding_window` means; null always means none
    window_switch: str | None = None  # the field that turns `sliding_window` on; None: it is on


FAMILIES = {
    "LlamaForCausalLM": Family(bias_key="attention_bias", mlp_bias_key="mlp_bias", heads_default=True),
    "MistralForCausalLM": Family(window_default=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window_switch="use_sliding_window"),
    "Qwen3ForCausalLM": Family(
        bias_key="attention_bias", qk_norm=True, head_dim=128, window_switch="use_sliding_window"
    ),
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `factor` and what follows belong to the scaled kinds; see `layers.rope` for the formulas."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `sliding_window` is the shortest window of any layer in tokens: sequences up to that length are not affected by
    it, longer ones are not supported. `checkpoint_dtype` is the type the weights were saved in.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope: RopeConfig
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    checkpoint_dtype: str = "float32"

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """KV of one token over all layers, keys and values."""
        return 2 * self.num_layers * self.kv_size * element_bytes

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The description that `config.json`, as plain data, gives.

        Raises:
            ConfigError: a field is missing, malformed or asks for what the decoder lacks; `param` names it.
        """
        architecture = _architecture(data)
        family = FAMILIES[architecture]
        _refuse_unsupported(data)
        num_heads, hidden_size = _count(data, "num_attention_heads"), _count(data, "hidden_size")
        num_kv_heads = _count(data, "num_key_value_heads", num_heads if family.heads_default else None)
        if num_heads % num_kv_heads:
            raise _error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads = {num_heads}")
        bias = family.bias_key is not None and bool(data.get(family.bias_key, False))
        return cls(
            architecture=architecture,
            vocab_size=_count(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_count(data, "intermediate_size"),
            num_layers=_count(data, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(data, family.head_dim or hidden_size // num_heads),
            rms_norm_eps=_number(data, "rms_norm_eps", 1e-6),
            max_position_embeddings=_count(data, "max_position_embeddings"),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            rope=_rope(data),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            mlp_bias=family.mlp_bias_key is not None and bool(data.get(family.mlp_bias_key, False)),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(data, family),
            checkpoint_dtype=_checkpoint_dtype(data),
        )


def _error(key: str, message: str) -> ConfigError:
    return ConfigError(f"config.json: {key}: {message}", key)


def _architecture(data: Mapping[str, Any]) -> str:
    names = data.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return str(name)
    found = ", ".join(map(str, names)) or "nothing"
    raise _error("architectures", f"allowed: {', '.join(FAMILIES)}; got {found}")


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    if data.get("quantization_config"):
        raise _error("quantization_config", "quantized checkpoints are not supported; allowed: none")
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise _error("hidden_act", f"allowed: silu; got {activation}")
    layer_types = set(data.get("layer_types") or ())
    if layer_types - {"full_attention", "sliding_attention"}:
        raise _error("layer_types", f"allowed: full_attention, sliding_attention; got {', '.join(sorted(layer_types))}")


def _count(data: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise _error(key, "required")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _error(key, f"a positive integer was expected, got {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise _error(key, "required")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise _error(key, f"a positive number was expected, got {value!r}")
    return float(value)


def _head_dim(data: Mapping[str, Any], default: int) -> int:
    head_dim = _count(data, "head_dim", default)
    if head_dim % 2 or head_dim > 256:
        raise _error("head_dim", f"an even number up to 256 was expected, got {head_dim}")
    return head_dim


def _sliding_window(data: Mapping[str, Any], family: Family) -> int | None:
    window = data.get("sliding_window", family.window_default)
    if window is None:
        return None
    if family.window_switch is not None and not data.get(family.window_switch, False):
        return None
    layer_types = data.get("layer_types")
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return _count({"sliding_window": window}, "sliding_window")


def _checkpoint_dtype(data: Mapping[str, Any]) -> str:
    dtype = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    allowed = ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise _error("dtype", f"allowed: {', '.join(allowed)}; got {dtype}")
    return dtype


def _rope(data: Mapping[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (before)."""
    key = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    scaling = data.get(key) or {}
    if not isinstance(scaling, Mapping) or any(isinstance(value, Mapping) for value in scaling.values()):
        raise _error(key, "one flat mapping for all layers was expected")
    theta = _number({"rope_theta": data.get("rope_theta"), **scaling}, "rope_theta", 10_000.0)
    partial = {"partial_rotary_factor": data.get("partial_rotary_factor"), **scaling}
    if _number(partial, "partial_rotary_factor", 1.0) != 1.0:
        raise _error("partial_rotary_factor", "allowed: 1.0")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, _number(scaling, "factor"))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            _number(scaling, "factor"),
            original_max_position=_original_max_position(data, scaling),
            low_freq_factor=_number(scaling, "low_freq_factor"),
            high_freq_factor=_number(scaling, "high_freq_factor"),
        )
    if kind == "yarn":
        return _yarn(data, scaling, theta)
    raise _error(f"{key}.rope_type", f"allowed: {', '.join(ROPE_KINDS)}; got {kind}")


def _original_max_position(data: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    fallback = _count(data, "original_max_position_embeddings", _count(data, "max_position_embeddings"))
    return _count(scaling, "original_max_position_embeddings", fallback)


def _yarn(data: Mapping[str, Any], scaling: Mapping[str, Any], theta: float) -> RopeConfig:
    def optional(key: str) -> float | None:
        return None if scaling.get(key) is None else _number(scaling, key)

    original = _original_max_position(data, scaling)
    return RopeConfig(
        theta,
        "yarn",
        _number(scaling, "factor", _count(data, "max_position_embeddings") / original),
        original_max_position=original,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        truncate=bool(scaling.get("truncate", True)),
        attention_factor=optional("attention_factor"),
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
    )

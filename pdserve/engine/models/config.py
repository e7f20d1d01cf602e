"""What the engine must know of a model, read from Hugging Face's `config.json`.

Owns the mapping from the families' configuration files to one description, and the refusal of everything that the
decoder does not implement: a field that would change the model's output is honoured or is an error, never skipped
(`pdserve.model_fields` has the list). Rotary positions are `rope_config`'s.
Not here: reading files (`pdserve.model_store`), the decoder itself (`pdserve.engine.models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.engine.layers.rope_config import RopeConfig, parse_rope
from pdserve.model_fields import check_known, count, error, flag, number


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

    @property
    def own_fields(self) -> frozenset[str]:
        """What of `config.json` is honoured for this family and not for all."""
        switched = {self.window_switch, "max_window_layers"} if self.window_switch else set()
        return frozenset({key for key in (self.bias_key, self.mlp_bias_key, *switched) if key is not None})


FAMILIES = {
    "LlamaForCausalLM": Family(bias_key="attention_bias", mlp_bias_key="mlp_bias", heads_default=True),
    "MistralForCausalLM": Family(window_default=4096),
    "Qwen2ForCausalLM": Family(qkv_bias=True, window_switch="use_sliding_window"),
    "Qwen3ForCausalLM": Family(
        bias_key="attention_bias", qk_norm=True, head_dim=128, window_switch="use_sliding_window"
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    `max_position_embeddings` is the file's; how long a sequence may be says `rope.max_positions`. `sliding_window` is
    the shortest window of any layer in tokens: sequences up to that length are not affected by it, longer ones are not
    supported. `checkpoint_dtype` is the type the weights were saved in.
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
        check_known(data, architecture, family.own_fields)
        num_heads, hidden_size = count(data, "num_attention_heads"), count(data, "hidden_size")
        num_kv_heads = count(data, "num_key_value_heads", num_heads if family.heads_default else None)
        if num_heads % num_kv_heads:
            raise error("num_key_value_heads", f"{num_kv_heads} does not divide num_attention_heads = {num_heads}")
        bias = family.bias_key is not None and flag(data, family.bias_key)
        return cls(
            architecture=architecture,
            vocab_size=count(data, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=count(data, "intermediate_size"),
            num_layers=count(data, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(data, family.head_dim or hidden_size // num_heads),
            rms_norm_eps=number(data, "rms_norm_eps", 1e-6),
            max_position_embeddings=count(data, "max_position_embeddings"),
            tie_word_embeddings=flag(data, "tie_word_embeddings"),
            rope=parse_rope(data),
            qkv_bias=family.qkv_bias or bias,
            o_bias=bias,
            mlp_bias=family.mlp_bias_key is not None and flag(data, family.mlp_bias_key),
            qk_norm=family.qk_norm,
            sliding_window=_sliding_window(data, family),
            checkpoint_dtype=_checkpoint_dtype(data),
        )


def _architecture(data: Mapping[str, Any]) -> str:
    names = data.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return str(name)
    found = ", ".join(map(str, names)) or "nothing"
    raise error("architectures", f"allowed: {', '.join(FAMILIES)}; got {found}")


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    if data.get("quantization_config"):
        raise error("quantization_config", "quantized checkpoints are not supported; allowed: none")
    activation = data.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise error("hidden_act", f"allowed: silu; got {activation}")
    layer_types = set(data.get("layer_types") or ())
    if layer_types - {"full_attention", "sliding_attention"}:
        raise error("layer_types", f"allowed: full_attention, sliding_attention; got {', '.join(sorted(layer_types))}")


def _head_dim(data: Mapping[str, Any], default: int) -> int:
    head_dim = count(data, "head_dim", default)
    if head_dim % 2 or head_dim > 256:
        raise error("head_dim", f"an even number up to 256 was expected, got {head_dim}")
    return head_dim


def _sliding_window(data: Mapping[str, Any], family: Family) -> int | None:
    window = data.get("sliding_window", family.window_default)
    if window is None:
        return None
    if family.window_switch is not None and not flag(data, family.window_switch):
        return None
    layer_types = data.get("layer_types")
    if layer_types and "sliding_attention" not in layer_types:
        return None
    # Without a list, the layers from `max_window_layers` on have the window.
    num_layers = count(data, "num_hidden_layers")
    if family.window_switch is not None and not layer_types and data.get("max_window_layers", 0) >= num_layers:
        return None
    return count({"sliding_window": window}, "sliding_window")


def _checkpoint_dtype(data: Mapping[str, Any]) -> str:
    dtype = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    allowed = ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise error("dtype", f"allowed: {', '.join(allowed)}; got {dtype}")
    return dtype

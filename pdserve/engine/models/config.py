"""What a family of models is, and how it reads what the engine must know from Hugging Face's `config.json`.

Owns the refusal of what no family implements: a field that would change the model's output is honoured or is an error,
never skipped (`pdserve.model_fields`). What a family adds stands in its own file; rotary positions are `rope_config`'s.
Not here: reading files (`pdserve.model_store`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from pdserve.engine.layers.builder import Builder
from pdserve.engine.models.decoder import Decoder
from pdserve.model_fields import check_known, count, error, flag

_KEYS = frozenset(
    {
        "architectures", "model_type", "vocab_size", "tie_word_embeddings", "dtype", "torch_dtype",
        "quantization_config",
    }
)  # fmt: skip
"""What is read for every family."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(ABC):
    """A model of one family, which is a subclass: `read` says what its `config.json` means, `build` what it computes.

    `max_positions` is the longest sequence that its positions are made for, in tokens; `scaling` is the kind of rope
    that makes it so. `sliding_window` is the shortest window of any layer, in tokens, where the family attends as if
    there were none: longer sequences are not supported. `checkpoint_dtype` is the type the weights were saved in.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    scaling: str = "default"
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    checkpoint_dtype: str = "float32"

    @classmethod
    @abstractmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """The model that `config.json`, as plain data, describes.

        Raises:
            ConfigError: a field is missing, malformed or asks for what the family lacks; `param` names it.
        """

    @abstractmethod
    def build(self, build: Builder) -> Decoder:
        """A rank's share of the model, whose weights are declared and not filled."""


def check_keys(data: Mapping[str, Any], keys: frozenset[str]) -> str:
    """The architecture of a `config.json` that asks for nothing but what is read of `keys` and of every family's.

    Raises:
        ConfigError: it asks for more; `param` names the first such field.
    """
    if data.get("quantization_config"):
        raise error("quantization_config", "quantized checkpoints are not supported; allowed: none")
    architecture = str(data["architectures"][0])
    check_known(data, architecture, _KEYS | keys)
    return architecture


def check_head_dim(head_dim: int, key: str = "head_dim") -> int:
    """`head_dim`, if attention can take it. Raises ConfigError, which names the field `key`."""
    if head_dim % 2 or head_dim > 256:
        raise error(key, f"heads of an even number up to 256 were expected, got {head_dim}")
    return head_dim


def read_window(data: Mapping[str, Any], default: int | None = None, switch: str | None = None) -> int | None:
    """The shortest window of any layer; None without one. Raises ConfigError.

    Args:
        default: what a missing `sliding_window` means; null always means none.
        switch: the field that turns `sliding_window` on; None: it is on.
    """
    layer_types = data.get("layer_types")
    unknown = set(layer_types or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        raise error("layer_types", f"allowed: full_attention, sliding_attention; got {', '.join(sorted(unknown))}")
    window = data.get("sliding_window", default)
    if window is None or (switch is not None and not flag(data, switch)):
        return None
    if layer_types and "sliding_attention" not in layer_types:
        return None
    # Without a list, the layers from `max_window_layers` on have the window.
    if switch is not None and not layer_types and data.get("max_window_layers", 0) >= count(data, "num_hidden_layers"):
        return None
    return count({"sliding_window": window}, "sliding_window")


def read_dtype(data: Mapping[str, Any]) -> str:
    """The type the weights were saved in. Raises ConfigError."""
    dtype = str(data.get("dtype") or data.get("torch_dtype") or "float32").removeprefix("torch.")
    allowed = ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise error("dtype", f"allowed: {', '.join(allowed)}; got {dtype}")
    return dtype

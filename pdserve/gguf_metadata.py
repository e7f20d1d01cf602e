"""What a GGUF file says and transformers' reader drops without a word: rope scaling, head sizes, windows, stop tokens.

Owns the list of a GGUF model's keys (`{arch}.*`; ggml's gguf.md and llama.cpp's loader). One that changes the output is
carried over to `config.json` or refused by name, and so is a tensor that has no place in the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from gguf import GGUFReader

ROPE_DIVISORS = "rope_freqs.weight"
"""The tensor that divides the rotary frequencies, one number a pair of dimensions (Llama 3.1 and later)."""

_NOT_NEEDED = (ROPE_DIVISORS, "attn_rot_embd.weight")  # the latter: frequencies, which the configuration gives

_STOP_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# What transformers reads, what is read here, and what says nothing of the output.
_KNOWN = frozenset(
    {
        "context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base",
        "rope.dimension_count", "attention.head_count", "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
        "attention.sliding_window", "attention.causal", "tensor_data_layout", "rope.scale_linear",
        "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
        "rope.scaling.attn_factor", "rope.scaling.yarn_log_multiplier", "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    }
)  # fmt: skip


class GgufMetadata:
    """The keys of one file.

    Raises:
        ValueError: one of them asks for what is not supported.
    """

    def __init__(self, reader: GGUFReader) -> None:
        self._reader = reader
        self._arch = str(reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            key = name.removeprefix(f"{self._arch}.")
            if key != name and key not in _KNOWN and field.contents() not in (0, False, "", []):
                raise ValueError(f"{name} = {field.contents()!r} is not supported")

    def config_changes(self, config: dict[str, Any]) -> dict[str, Any]:
        """The fields to set in `config`, which is what transformers has made of the file.

        Raises:
            ValueError: the file asks for what is not supported.
        """
        heads = int(self._get("attention.head_count"))
        head_dim = int(self._get("attention.key_length", int(self._get("embedding_length")) // heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if int(self._get(key, head_dim)) != head_dim:
                raise ValueError(f"{self._arch}.{key} = {self._get(key)} unlike the heads' {head_dim} is not supported")
        changes: dict[str, Any] = {"head_dim": head_dim}
        if self._get("attention.sliding_window", 0):
            changes["sliding_window"] = int(self._get("attention.sliding_window"))
        scaling = self._rope_scaling(config["max_position_embeddings"])
        if scaling is not None:
            changes["rope_parameters"] = {"rope_theta": config["rope_parameters"]["rope_theta"], **scaling}
        return changes

    def stop_token_ids(self) -> list[int]:
        """The tokens that end a text, a turn or a message, as llama.cpp takes them."""
        fields = self._reader.fields
        return sorted({int(fields[name].contents()) for name in _STOP_TOKENS if name in fields})

    def check_tensors(self, placed: Collection[str]) -> None:
        """Raises ValueError if the file has a tensor that is not among those that were `placed`."""
        names = [tensor.name for tensor in self._reader.tensors]
        lost = [name for name in names if name not in placed and not name.endswith(_NOT_NEEDED)]
        if lost:
            raise ValueError(f"tensors without a place in the model: {', '.join(sorted(lost)[:4])}")

    def _rope_scaling(self, context_length: int) -> dict[str, Any] | None:
        factor = float(self._get("rope.scaling.factor", 0.0) or self._get("rope.scale_linear", 0.0) or 1.0)
        # llama.cpp reads a factor without a type as linear.
        kind = str(self._get("rope.scaling.type", "linear"))
        divisors = self._rope_divisors()
        if divisors is not None:
            if kind != "none" and factor != 1.0:
                raise ValueError(f"{ROPE_DIVISORS} beside {self._arch}.rope.scaling.factor is not supported")
            # Not Llama 3's own formula, whose numbers the file has not: its result, dimension by dimension.
            return {
                "rope_type": "longrope",
                "long_factor": divisors,
                "short_factor": divisors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": context_length,
            }
        if kind == "none" or (kind == "linear" and factor == 1.0):
            return None
        if kind == "linear":
            original = int(self._get("rope.scaling.original_context_length", 0))
            return {"rope_type": "linear", "factor": factor, **_original(original)}
        if kind == "yarn":
            return self._yarn(factor, context_length)
        raise ValueError(f"{self._arch}.rope.scaling.type = {kind} is not supported")

    def _yarn(self, factor: float, context_length: int) -> dict[str, Any]:
        extrapolation = float(self._get("rope.scaling.yarn_ext_factor", 1.0))
        if extrapolation not in (1.0, -1.0):  # -1 stands for the default, which is 1
            raise ValueError(f"{self._arch}.rope.scaling.yarn_ext_factor = {extrapolation:g} is not supported")
        yarn = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": int(
                self._get("rope.scaling.original_context_length", 0) or context_length
            ),
        }
        for key in ("beta_fast", "beta_slow"):
            if self._get(f"rope.scaling.yarn_{key}", 0.0):
                yarn[key] = float(self._get(f"rope.scaling.yarn_{key}"))
        attention_factor = self._yarn_attention_factor(factor)
        return yarn if attention_factor is None else {**yarn, "attention_factor": attention_factor}

    def _yarn_attention_factor(self, factor: float) -> float | None:
        """None: what the factor gives by itself. `attn_factor` multiplies it; `yarn_attn_factor` is the checkpoint's
        own `attention_factor`; `yarn_log_multiplier` is its `mscale_all_dim`, with an `mscale` of 1."""
        own = float(self._get("rope.scaling.yarn_attn_factor", 0.0))
        multiplier = float(self._get("rope.scaling.attn_factor", 1.0))
        log_multiplier = float(self._get("rope.scaling.yarn_log_multiplier", 0.0))
        if own <= 0 and multiplier == 1.0 and not log_multiplier:
            return None
        if own <= 0:
            own = _magnitude(factor, 1.0) / (_magnitude(factor, log_multiplier) if log_multiplier else 1.0)
        return own * multiplier

    def _rope_divisors(self) -> list[float] | None:
        for tensor in self._reader.tensors:
            if tensor.name == ROPE_DIVISORS:
                divisors = [float(each) for each in tensor.data]
                if min(divisors) < 1.0:
                    raise ValueError(f"{ROPE_DIVISORS} holds no divisors, but numbers below 1")
                return None if all(each == 1.0 for each in divisors) else divisors
        return None

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(f"{self._arch}.{key}")
        if field is None and default is None:
            raise ValueError(f"the file lacks {self._arch}.{key}")
        return default if field is None else field.contents()


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _original(length: int) -> dict[str, int]:
    return {"original_max_position_embeddings": length} if length else {}

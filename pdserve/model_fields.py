"""The fields of `config.json`: which are known, and reading one.

Owns the rule that a field which would change the model's output is honoured or is an error. It is an allow-list: what
is neither read by the model's family nor known to leave the output alone must be null or false. Light to import: no
torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pdserve import generation_defaults
from pdserve.errors import ConfigError

# Where a model came from, how it was trained, how other programs run it: the output is the same whatever they say.
_BOOKKEEPING = frozenset(
    {
        "transformers_version", "transformers.js_config", "_name_or_path", "name_or_path", "_model_name_or_path",
        "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
        "_flash_attn_2_enabled", "use_flash_attn", "auto_map", "tokenizer_class", "is_llama_config", "unsloth_fixed",
        "unsloth_version", "keys_to_ignore_at_inference", "initializer_range", "attention_dropout", "hidden_dropout",
        "hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "resid_pdrop", "embd_pdrop",
        "classifier_dropout", "gradient_checkpointing", "pretraining_tp", "use_cache", "return_dict", "torchscript",
        "chunk_size_feed_forward", "is_decoder", "id2label", "label2id", "problem_type", "task_specific_params",
        "finetuning_task", "tf_legacy_loss", "max_sequence_length", "model_max_length", "seq_length",
        "unk_token_id", "sep_token_id", "mask_token_id", "cls_token_id",
    }
)  # fmt: skip

_NEUTRAL: dict[str, Any] = {"pruned_heads": {}, "use_bfloat16": True}
"""Fields that ask for nothing with one more value than null and false."""


def check_known(data: Mapping[str, Any], family: str, honoured: Collection[str]) -> None:
    """Raises ConfigError for the first field that may change the output and is not `honoured`.

    Args:
        family: for the message.
    """
    for key, value in data.items():
        if key in honoured or key in _BOOKKEEPING or key in generation_defaults.FIELDS:
            continue
        if value is None or value is False or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        raise error(key, f"not supported for {family}, got {_shortened(value)}; allowed: null, false")


def that_shape_the_output(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a whole file by which two models may differ; null and false are the same as leaving it out.

    The type that the weights are stored in is theirs to say, and the type that is computed in each worker's own.
    """
    return {
        key: value
        for key, value in data.items()
        if value is not None
        and value is not False
        and key not in _BOOKKEEPING
        and key not in generation_defaults.FIELDS
        and key not in ("dtype", "torch_dtype")
    }


def error(key: str, message: str) -> ConfigError:
    return ConfigError(f"config.json: {key}: {message}", key)


def count(data: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer. Raises ConfigError, also if it is missing and there is no default."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise error(key, "required")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise error(key, f"a positive integer was expected, got {value!r}")
    return value


def number(data: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number. Raises ConfigError, also if it is missing and there is no default."""
    value = default if data.get(key) is None else data[key]
    if value is None:
        raise error(key, "required")
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise error(key, f"a positive number was expected, got {value!r}")
    return float(value)


def flag(data: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false. Raises ConfigError."""
    value = default if data.get(key) is None else data[key]
    if not isinstance(value, bool):
        raise error(key, f"true or false was expected, got {value!r}")
    return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

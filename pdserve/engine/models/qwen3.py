"""Qwen3: Llama with a norm over each head of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pdserve.engine.models.config import read_window
from pdserve.engine.models.llama import Llama
from pdserve.model_fields import flag


class Qwen3(Llama):
    """See `ModelConfig`."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """See `ModelConfig`."""
        bias = flag(data, "attention_bias")
        return cls.read_kin(
            data,
            {"attention_bias", "use_sliding_window", "max_window_layers"},
            head_dim_default=128,
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=True,
            sliding_window=read_window(data, switch="use_sliding_window"),
        )

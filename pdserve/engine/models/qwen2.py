"""Qwen2 and Qwen2.5: Llama with biases in the projections that make queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pdserve.engine.models.config import read_window
from pdserve.engine.models.llama import Llama


class Qwen2(Llama):
    """See `ModelConfig`."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Self:
        """See `ModelConfig`."""
        window = read_window(data, switch="use_sliding_window")
        return cls.read_kin(data, {"use_sliding_window", "max_window_layers"}, qkv_bias=True, sliding_window=window)

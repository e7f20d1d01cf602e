"""Rotary position embedding: the angles. Applying them is `pd_kernels.rope_cache`'s business.

Formulas: RoPE (arXiv 2104.09864) with the half-split layout of the GPT-NeoX family; "linear" is position
interpolation (2306.15595), "yarn" 2309.00071, "llama3" the Llama 3.1 release's frequency-dependent interpolation,
"longrope" one divisor a pair of dimensions (2402.13753).
Every step of the arithmetic is in float32, as in the reference implementations.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pdserve.engine.layers.rope_config import RopeConfig
from pdserve.errors import ConfigError


class RotaryEmbedding:
    """Cosines and sines for positions; holds `head_dim / 2` frequencies and nothing that grows with the context."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        frequencies, self._attention_factor = inverse_frequencies(rope, head_dim)
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [num_tokens, head_dim / 2] float32, for `positions` [num_tokens]."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._attention_factor != 1.0:
            cos, sin = cos * self._attention_factor, sin * self._attention_factor
        return cos, sin


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, [head_dim / 2] float32, and the factor on cos and sin."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, frequencies), _yarn_attention_factor(rope)
    if rope.kind == "longrope":
        return _longrope(rope, head_dim, exponents), _longrope_attention_factor(rope)
    return frequencies, 1.0  # "dynamic" too, up to the length that is supported


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Long wavelengths are divided by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    longest_kept = rope.original_max_position / rope.high_freq_factor
    shortest_divided = rope.original_max_position / rope.low_freq_factor
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = torch.where(wavelengths > shortest_divided, frequencies / rope.factor, blended)
    return torch.where(wavelengths < longest_kept, frequencies, scaled)


def _yarn(rope: RopeConfig, head_dim: int, frequencies: Tensor) -> Tensor:
    """Dimensions that turn often keep their frequency, those that turn rarely are interpolated, with a ramp between."""

    def dimension_turning(rotations: float) -> float:
        wavelength_ratio = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength_ratio) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * ramp + frequencies * (1 - ramp)


def _longrope(rope: RopeConfig, head_dim: int, exponents: Tensor) -> Tensor:
    if len(rope.divisors) != head_dim // 2:
        message = f"config.json: long_factor: {head_dim // 2} numbers were expected, got {len(rope.divisors)}"
        raise ConfigError(message, "long_factor")
    return 1.0 / (torch.tensor(rope.divisors, dtype=torch.float32) * rope.theta**exponents)


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_position)) if rope.factor > 1 else 1.0


def _yarn_attention_factor(rope: RopeConfig) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)

"""Rotary frequencies of every kind against transformers' own functions, over random parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pdserve.engine.layers.rope import RotaryEmbedding, inverse_frequencies
from pdserve.engine.layers.rope_config import RopeConfig
from pdserve.engine.models.registry import describe
from pdserve.errors import ConfigError

HEAD_DIM, MAX_POSITION = 64, 4096
CPU = torch.device("cpu")


def both(rope: dict[str, Any]) -> tuple[RopeConfig, LlamaConfig]:
    """Ours and transformers' reading of one file."""
    theirs = LlamaConfig(
        hidden_size=2 * HEAD_DIM, num_attention_heads=2, max_position_embeddings=MAX_POSITION, rope_parameters=rope
    )
    ours = describe({**theirs.to_dict(), "architectures": ["LlamaForCausalLM"]}).rope
    return ours, theirs


def check(rope: dict[str, Any]) -> None:
    ours, theirs = both(rope)
    frequencies, attention_factor = inverse_frequencies(ours, HEAD_DIM)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, CPU)
    torch.testing.assert_close(frequencies, expected, rtol=2e-6, atol=0)
    assert attention_factor == pytest.approx(expected_factor, rel=1e-6)


THETAS = st.sampled_from([500.0, 1e4, 1e6])
FACTORS = st.floats(1.0, 64.0)
ORIGINALS = st.integers(64, MAX_POSITION)


@settings(max_examples=25, deadline=None)
@given(theta=THETAS, factor=FACTORS, kind=st.sampled_from(["linear", "dynamic"]))
def test_linear_and_dynamic(theta: float, factor: float, kind: str) -> None:
    check({"rope_type": kind, "rope_theta": theta, "factor": factor})


@settings(max_examples=25, deadline=None)
@given(theta=THETAS, factor=FACTORS, original=ORIGINALS, low=st.floats(0.5, 2.0), width=st.floats(0.5, 8.0))
def test_llama3(theta: float, factor: float, original: int, low: float, width: float) -> None:
    bounds = {"low_freq_factor": low, "high_freq_factor": low + width, "original_max_position_embeddings": original}
    check({"rope_type": "llama3", "rope_theta": theta, "factor": factor, **bounds})


@settings(max_examples=50, deadline=None)
@given(
    theta=THETAS,
    factor=FACTORS,
    original=ORIGINALS,
    more=st.fixed_dictionaries(
        {},
        optional={
            "attention_factor": st.floats(0.5, 2.0),
            "beta_fast": st.floats(8.0, 64.0),
            "beta_slow": st.floats(0.5, 4.0),
            "mscale": st.sampled_from([0.0, 0.707, 1.0]),
            "mscale_all_dim": st.sampled_from([0.0, 0.707, 1.5]),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn(theta: float, factor: float, original: int, more: dict[str, Any]) -> None:
    facts = {"factor": factor, "original_max_position_embeddings": original, **more}
    check({"rope_type": "yarn", "rope_theta": theta, **facts})


@settings(max_examples=25, deadline=None)
@given(
    divisors=st.lists(st.floats(1.0, 64.0), min_size=HEAD_DIM // 2, max_size=HEAD_DIM // 2),
    original=ORIGINALS,
    attention_factor=st.none() | st.floats(0.5, 2.0),
)
def test_longrope_with_one_list(divisors: list[float], original: int, attention_factor: float | None) -> None:
    facts: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": divisors,
        "short_factor": divisors,
    }
    if attention_factor is not None:
        facts["attention_factor"] = attention_factor
    check({**facts, "original_max_position_embeddings": original})


def test_longrope_of_another_width_is_refused() -> None:
    ours = RopeConfig(1e4, "longrope", original_max_position=64, divisors=(1.0,) * 5)
    with pytest.raises(ConfigError, match="long_factor: 32 numbers"):
        inverse_frequencies(ours, HEAD_DIM)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX_POSITION},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_angles_up_to_the_longest_sequence_that_is_served(rope: dict[str, Any]) -> None:
    ours, theirs = both({"rope_theta": 1e4, **rope})
    positions = torch.tensor([0, 1, 77, MAX_POSITION - 1, ours.max_positions - 1])
    cos, sin = RotaryEmbedding(ours, HEAD_DIM, CPU)(positions)
    expected_cos, expected_sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), positions[None])
    assert ours.max_positions == (4 * MAX_POSITION if rope["rope_type"] in ("linear", "yarn") else MAX_POSITION)
    torch.testing.assert_close(cos, expected_cos[0, :, : HEAD_DIM // 2], rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(sin, expected_sin[0, :, : HEAD_DIM // 2], rtol=1e-3, atol=2e-3)

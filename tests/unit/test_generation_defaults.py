"""What generation_config.json may say, what becomes of it in both fronts, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig

from pdserve.errors import ConfigError
from pdserve.generation_defaults import FIELDS, GenerationDefaults, parse
from pdserve.model_store import load_generation_defaults
from pdserve.protocol import Sampling
from pdserve.sampling_params import SamplingParams
from proxy.sampling import to_sampling
from proxy.schemas.completions import CompletionRequest

QWEN_CHAT = {
    "bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643,
    "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.37.0",
}  # fmt: skip
QWEN_BASE = {
    "bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048,
    "transformers_version": "4.37.0",
}  # fmt: skip
LLAMA3 = {
    "bos_token_id": 128000, "eos_token_id": [128001, 128009], "do_sample": True, "temperature": 0.6,
    "max_length": 4096, "top_p": 0.9, "transformers_version": "4.40.0.dev0",
}  # fmt: skip
TINYLLAMA = {
    "bos_token_id": 1, "eos_token_id": 2, "max_length": 2048, "pad_token_id": 0, "transformers_version": "4.35.0"
}  # fmt: skip


def from_proxy(defaults: GenerationDefaults, max_tokens: int = 10, **asked: Any) -> Sampling:
    body = CompletionRequest.model_validate({"model": "m", "prompt": "p", **asked})
    return to_sampling(body, defaults, 7, max_tokens)


def from_api(defaults: GenerationDefaults, max_tokens: int = 10, **asked: Any) -> Sampling:
    return SamplingParams(max_tokens=max_tokens, **asked).to_sampling(7, defaults=defaults)


FRONTS = pytest.mark.parametrize("front", [from_proxy, from_api])


@FRONTS
@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (QWEN_CHAT, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
        (QWEN_BASE, {"temperature": 0.0}),
        (LLAMA3, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "min_p": 0.05}, {"temperature": 0.6, "min_p": 0.05}),
        ({"temperature": 0.6, "top_k": -1}, {"temperature": 0.6, "top_k": 0}),
        (
            {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": -0.5},
            {"temperature": 1.0, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        ),
        ({"temperature": 1.0, "min_new_tokens": 4}, {"temperature": 1.0, "min_tokens": 4}),
        ({"temperature": 1.0, "min_new_tokens": 40}, {"temperature": 1.0, "min_tokens": 10}),
    ],
)
def test_a_request_that_says_nothing_gets_what_the_file_says(
    front: Any, file: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert front(parse(file, "f")) == Sampling(seed=7, max_tokens=10, **expected)


@FRONTS
def test_what_a_request_says_wins_even_where_it_is_neutral(front: Any) -> None:
    file = {
        "temperature": 0.6, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "presence_penalty": 1.0,
        "frequency_penalty": 1.0, "min_new_tokens": 3,
    }  # fmt: skip
    asked = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "min_tokens": 0,
    }  # fmt: skip
    assert front(parse(file, "f"), **asked) == Sampling(seed=7, max_tokens=10)
    assert front(parse({"do_sample": False}, "f"), temperature=0.5).temperature == 0.5


def test_without_a_word_the_proxy_samples_as_openai_does_and_the_api_is_greedy() -> None:
    assert from_proxy(parse(TINYLLAMA, "f")) == Sampling(seed=7, max_tokens=10)
    assert from_api(parse(TINYLLAMA, "f")) == Sampling(seed=7, max_tokens=10, temperature=0.0)


@pytest.mark.parametrize("file", [QWEN_CHAT, QWEN_BASE, LLAMA3, TINYLLAMA, GenerationConfig().to_dict()])
def test_files_of_well_known_models_are_accepted(file: dict[str, Any]) -> None:
    parse(file, "f")


def test_every_field_of_transformers_is_known() -> None:
    assert set(GenerationConfig().to_dict()) <= FIELDS


@pytest.mark.parametrize(
    ("name", "value", "neutral"),
    [
        ("num_beams", 4, 1),
        ("num_beam_groups", 2, 1),
        ("num_return_sequences", 2, 1),
        ("diversity_penalty", 0.5, 0.0),
        ("no_repeat_ngram_size", 3, 0),
        ("encoder_no_repeat_ngram_size", 3, 0),
        ("encoder_repetition_penalty", 1.2, 1.0),
        ("bad_words_ids", [[5]], []),
        ("suppress_tokens", [1], []),
        ("begin_suppress_tokens", [1], []),
        ("forced_bos_token_id", 3, None),
        ("forced_eos_token_id", 3, None),
        ("forced_decoder_ids", [[1, 2]], None),
        ("sequence_bias", [[[1], 2.0]], None),
        ("typical_p", 0.9, 1.0),
        ("epsilon_cutoff", 1e-4, 0.0),
        ("eta_cutoff", 1e-4, 0.0),
        ("penalty_alpha", 0.6, 0.0),
        ("guidance_scale", 1.5, 1.0),
        ("min_length", 10, 0),
        ("stop_strings", ["x"], None),
        ("max_time", 3.0, None),
        ("exponential_decay_length_penalty", [5, 1.1], None),
        ("watermarking_config", {"bias": 2.0}, None),
        ("of_a_later_version", "on", False),
    ],
)
def test_what_changes_the_output_and_is_lacking_is_refused_by_name(name: str, value: Any, neutral: Any) -> None:
    with pytest.raises(ConfigError, match=f"folder/generation_config.json: {name}: ") as caught:
        parse({"temperature": 0.5, name: value}, "folder/generation_config.json")
    assert caught.value.param == "model"
    assert parse({"temperature": 0.5, name: neutral}, "f") == GenerationDefaults(temperature=0.5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "warm"),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 2.5),
        ("top_k", True),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("do_sample", 1),
        ("max_new_tokens", 0),
        ("eos_token_id", "2"),
        ("eos_token_id", [True]),
    ],
)
def test_a_malformed_value_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        parse({name: value}, "f")


def test_an_old_configuration_speaks_where_there_is_no_file(tmp_path: Path) -> None:
    """Its class's own defaults are in it, too, and say nothing."""
    old = {"eos_token_id": 2, "do_sample": False, "temperature": 1.0, "top_k": 50, "repetition_penalty": 1.2}
    (tmp_path / "config.json").write_text(json.dumps({**LlamaConfig().to_dict(), **old}))
    assert load_generation_defaults(tmp_path) == GenerationDefaults(eos_token_ids=(2,), repetition_penalty=1.2)
    (tmp_path / "config.json").write_text(json.dumps({**old, "num_beams": 3}))
    with pytest.raises(ConfigError, match="num_beams"):
        load_generation_defaults(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.9}))
    assert load_generation_defaults(tmp_path) == GenerationDefaults(eos_token_ids=(2,), top_p=0.9)

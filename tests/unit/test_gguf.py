"""Converting GGUF files: exactly, with all that they say of the output, or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pdserve import model_conversion, progress
from pdserve.engine.layers.rope import inverse_frequencies
from pdserve.engine.models.registry import describe
from pdserve.model_store import load_generation_defaults, read_config, resolve_model, tokenizer_folder

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 96


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_gguf(
    file: Path, extra: dict[str, np.ndarray] | None = None, metadata: Callable[[gguf.GGUFWriter], object] | None = None
) -> dict[str, np.ndarray]:
    """A one-layer llama with 8-bit matrices; returns what its tensors say, dequantised, by GGUF name.

    Args:
        extra: further tensors.
        metadata: writes further keys.
    """
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_end|>", "a", "b", "ab", *(f"t{i}" for i in range(27))]
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv_size, HIDDEN),
        "blk.0.attn_v.weight": (kv_size, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 30)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    values = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, noise)
            values[name] = noise
            continue
        quantised = gguf.quantize(noise, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        values[name] = gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    if metadata is not None:
        metadata(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Converts nothing but the model."""

    class Tokenizer:
        @staticmethod
        def from_pretrained(**_: Any) -> Tokenizer:
            return Tokenizer()

        def save_pretrained(self, target: Path) -> None:
            target.mkdir()

    monkeypatch.setattr(model_conversion, "AutoTokenizer", Tokenizer)


def half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a rotary projection from GGUF's order (pairs side by side) to Hugging Face's (halves)."""
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def test_a_gguf_file_is_converted_exactly_and_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    file = tmp_path / "tiny.gguf"
    values = write_gguf(file)
    # Another model's, of a download into the same folder.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve_model, [str(file), str(file)])
    assert first == second
    assert first.parent == cache
    written = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(file)) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.name]
    assert re.search(r"converting tiny\.gguf: 75% \(3 of 4 steps\), \d+ s, writing the weights", caplog.text)

    stored = load_file(first / "model.safetensors")
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": values["token_embd.weight"],
        layer + "self_attn.q_proj.weight": half_split(values["blk.0.attn_q.weight"], HEADS),
        layer + "self_attn.k_proj.weight": half_split(values["blk.0.attn_k.weight"], KV_HEADS),
        layer + "mlp.down_proj.weight": values["blk.0.ffn_down.weight"],
        layer + "input_layernorm.weight": values["blk.0.attn_norm.weight"],
    }
    for name, value in expected.items():
        assert np.array_equal(stored[name].numpy(), value), name
    config = read_config(first)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"] is True
    assert load_generation_defaults(first).eos_token_ids == (1,)
    assert tokenizer_folder(first) == first
    assert (first / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "Qwen2" not in (first / "tokenizer_config.json").read_text()


ROPE_KEYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "a factor alone": ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    "none": ({"type": "none", "factor": 4.0}, {"rope_type": "default"}),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ),
    "yarn with all": (
        {
            "type": "yarn", "factor": 4.0, "original_context_length": 32, "finetuned": True, "yarn_ext_factor": 1.0,
            "yarn_attn_factor": 1.25, "attn_factor": 2.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0,
        },
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 2.5,
            "beta_fast": 16.0, "beta_slow": 2.0,
        },
    ),
    "yarn with a logarithm": (
        {"type": "yarn", "factor": 4.0, "yarn_log_multiplier": 0.5},
        {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    ),
}  # fmt: skip


def add_keys(prefix: str, keys: dict[str, Any]) -> Callable[[gguf.GGUFWriter], None]:
    add = {str: "add_string", bool: "add_bool", int: "add_uint32", float: "add_float32"}

    def write(writer: gguf.GGUFWriter) -> None:
        for key, value in keys.items():
            getattr(writer, add[type(value)])(f"{prefix}{key}", value)

    return write


def frequencies(rope: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """What transformers makes of a rope's parameters, in heads as wide as the file's."""
    facts = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 128}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**facts, rope_parameters={"rope_theta": 5000.0, **rope}))
    return embedding.inv_freq, embedding.attention_scaling


@pytest.mark.parametrize("name", ROPE_KEYS)
def test_a_gguf_files_rope_scaling_is_carried_over(name: str, tmp_path: Path, no_tokenizer: None) -> None:
    written, meant = ROPE_KEYS[name]
    write_gguf(tmp_path / "scaled.gguf", metadata=add_keys("llama.rope.scaling.", written))
    model_conversion.convert_gguf(tmp_path / "scaled.gguf", tmp_path / "out")
    rope = describe(read_config(tmp_path / "out")).rope
    ours, attention_factor = inverse_frequencies(rope, HIDDEN // HEADS)
    theirs, theirs_attention_factor = frequencies(meant)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    assert attention_factor == pytest.approx(theirs_attention_factor, rel=1e-6)
    assert rope.max_positions == (512 if name in ("linear", "a factor alone", "yarn with a logarithm") else 128)


def test_a_gguf_files_rope_divisors_are_carried_over(tmp_path: Path, no_tokenizer: None) -> None:
    """The tensor as llama.cpp writes it for Llama 3.1, with a shorter original length."""
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    scaled, plain = frequencies(llama3)[0], frequencies({"rope_type": "default"})[0]
    write_gguf(tmp_path / "scaled.gguf", extra={"rope_freqs.weight": (plain / scaled).numpy()})
    model_conversion.convert_gguf(tmp_path / "scaled.gguf", tmp_path / "out")
    rope = describe(read_config(tmp_path / "out")).rope
    ours, attention_factor = inverse_frequencies(rope, HIDDEN // HEADS)
    torch.testing.assert_close(ours, scaled, rtol=1e-6, atol=0)
    assert not torch.allclose(ours, plain)
    assert (attention_factor, rope.max_positions) == (1.0, 128)


@pytest.mark.parametrize(
    ("keys", "extra", "named"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, {}, "rope.scaling.type"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, {}, "yarn_ext_factor"),
        ({"rope.scaling.factor": 2.0}, {"rope_freqs.weight": np.full(8, 2.0, np.float32)}, "rope_freqs.weight"),
        ({}, {"rope_freqs.weight": np.full(8, 0.5, np.float32)}, "rope_freqs.weight"),
        ({"rope.dimension_count": 8}, {}, "rope.dimension_count"),
        ({"attention.value_length": 8}, {}, "attention.value_length"),
        ({"expert_count": 8}, {}, "llama.expert_count"),
        ({"logit_scale": 0.5}, {}, "llama.logit_scale"),
        ({"attn_logit_softcapping": 50.0}, {}, "llama.attn_logit_softcapping"),
        ({}, {"blk.0.attn_q.bias": np.ones(HIDDEN, np.float32)}, "blk.0.attn_q.bias"),
        ({}, {"rope_factors_long.weight": np.ones(8, np.float32)}, "rope_factors_long.weight"),
    ],
)
def test_what_would_be_lost_of_a_gguf_file_is_refused_by_name(
    keys: dict[str, Any], extra: dict[str, np.ndarray], named: str, tmp_path: Path, no_tokenizer: None
) -> None:
    write_gguf(tmp_path / "m.gguf", extra=extra, metadata=add_keys("llama.", keys))
    with pytest.raises(ValueError, match=named):
        model_conversion.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")


def test_a_gguf_files_window_head_size_and_stop_tokens_are_carried_over(tmp_path: Path, no_tokenizer: None) -> None:
    keys = {"llama.attention.sliding_window": 64, "llama.expert_count": 0, "tokenizer.ggml.eot_token_id": 5}
    write_gguf(tmp_path / "m.gguf", metadata=add_keys("", keys))
    model_conversion.convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    config = describe(read_config(tmp_path / "out"))
    assert (config.sliding_window, config.head_dim) == (64, 16)
    assert load_generation_defaults(tmp_path / "out").eos_token_ids == (1, 5)

"""What config.json may say, and which field is named when it says something else."""

from __future__ import annotations

import platform
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from pd_kernels.kv_pack import margins
from pdserve import generation_defaults
from pdserve.config import CudaGraphConfig, KvCacheConfig, LlmArgs
from pdserve.engine.cache_spec import CacheGroup, CacheShare, CacheSpec
from pdserve.engine.layers.attention import AttentionKind
from pdserve.engine.layers.builder import Builder
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.registry import architectures, describe
from pdserve.engine.run import kv_pool
from pdserve.engine.run.decode_graphs import capture_sizes
from pdserve.engine.run.kv_pool import Demand, KvPool, fitting_blocks
from pdserve.engine.run.resources import (
    choose_attention,
    choose_device,
    choose_dtype,
    choose_graphs,
    choose_max_seq_len,
)
from pdserve.errors import ConfigError
from pdserve.generation_defaults import from_model_config
from tests.unit.model_files import FILES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 100,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_positions": 512,
}
CPU = torch.device("cpu")
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")


def config(**changes: Any) -> ModelConfig:
    return describe({**LLAMA, **changes})


def minimum(architecture: str) -> dict[str, Any]:
    """The fields that a family needs."""
    return GPT2 if architecture == "GPT2LMHeadModel" else {**LLAMA, "architectures": [architecture]}


def demand(**changes: Any) -> Demand:
    """Of the only cache group of `config(**changes)`, on one rank."""
    (share,) = config(**changes).build(Builder(torch.float32, torch.device("meta"))).cache_shares()
    return Demand.of(share, llm_args(), max_seq_len=64)


def kv_bytes_per_token(element_bytes: int) -> int:
    """Keys and values of two layers, with two heads of eight elements each."""
    return 2 * 2 * 2 * 8 * element_bytes


def llm_args(**changes: Any) -> LlmArgs:
    return LlmArgs(model="m", **changes)


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_understood(name: str) -> None:
    parsed = describe(FILES[name])
    assert parsed.num_layers == FILES[name]["num_hidden_layers"]
    assert parsed.sliding_window == (4096 if name == "Mistral-7B-v0.1" else None)
    longest = {"vicuna-7b-v1.5-16k": 16384, "Qwen2.5-7B-Instruct with yarn": 131072}
    assert parsed.max_positions == longest.get(name, FILES[name]["max_position_embeddings"])
    assert generation_defaults.parse(from_model_config(FILES[name]), "config.json").temperature is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_chunk_attention_config", {"chunk_size": 262144}),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("no_rope_layers", [1, 1, 0]),
        ("no_rope_layer_interval", 4),
        ("num_experts", 8),
        ("num_local_experts", 8),
        ("num_experts_per_tok", 2),
        ("scale_emb", 12),
        ("scale_depth", 1.4),
        ("dim_model_base", 256),
        ("logit_scale", 0.0625),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.0078125),
        ("query_pre_attn_scalar", 256),
        ("use_qk_norm", True),
        ("clip_qkv", 8.0),
        ("alibi", True),
        ("rope_interleaved", True),
        ("use_mrope", True),
        ("parallel_attn", True),
        ("attention_chunk_size", 8192),
        ("attn_temperature_tuning", 4),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization", {"bits": 4, "group_size": 64}),
        ("layernorm_type", "layernorm"),
        ("of_a_later_version", "on"),
    ],
)
@pytest.mark.parametrize("architecture", architectures())
def test_a_key_that_is_not_known_is_refused_by_name(architecture: str, key: str, value: Any) -> None:
    data = minimum(architecture)
    with pytest.raises(ConfigError, match=f"{key}: not supported for {architecture}") as caught:
        describe({**data, key: value})
    assert caught.value.param == key
    assert len(caught.value.message) < 200
    for neutral in (None, False):
        assert describe({**data, key: neutral}) == describe(data)


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("MistralForCausalLM", "attention_bias"),
        ("MistralForCausalLM", "mlp_bias"),
        ("MistralForCausalLM", "use_sliding_window"),
        ("Qwen2ForCausalLM", "attention_bias"),
        ("Qwen3ForCausalLM", "mlp_bias"),
        ("LlamaForCausalLM", "use_sliding_window"),
    ],
)
def test_a_key_of_another_family_is_refused_by_name(architecture: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: not supported for {architecture}"):
        describe({**LLAMA, "architectures": [architecture], key: True})


GPT2_CHANGES: list[tuple[dict[str, Any], str, str]] = [
    ({"n_head": 7}, "n_head", "does not divide"),
    ({"n_embd": 8}, "n_head", "even"),
    ({"activation_function": "swish"}, "activation_function", "gelu_new"),
    ({"scale_attn_weights": False}, "scale_attn_weights", "allowed: true"),
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx", "not supported"),
    ({"hidden_size": 64}, "hidden_size", "not supported"),
]


@pytest.mark.parametrize(("changes", "param", "text"), GPT2_CHANGES)
def test_what_is_not_supported_of_gpt2_is_named(changes: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        describe({**GPT2, **changes})
    assert caught.value.param == param


def test_a_published_gpt2_is_understood() -> None:
    parsed = describe(GPT2Config().to_dict() | {"architectures": ["GPT2LMHeadModel"]})
    assert (parsed.hidden_size, parsed.intermediate_size, parsed.max_positions) == (768, 3072, 1024)
    assert parsed.tie_word_embeddings


def test_the_minimum() -> None:
    parsed = config()
    assert parsed.head_dim == 8
    assert (parsed.rope.theta, parsed.rope.kind, parsed.rms_norm_eps) == (10_000.0, "default", 1e-6)
    assert demand().share == CacheShare(CacheGroup(CacheSpec("full", 2, 8), (0, 1)), range(2), range(2))


def test_old_and_new_ways_to_write_rope_are_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    old = config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling})
    new = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert (
        old
        == new
        == config(
            rope_scaling={"rope_type": "llama3", **scaling},
            rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling},
        )
    )
    assert new.rope.theta == 5e5
    assert config(rope_scaling={"type": "linear", "factor": 2}).rope.factor == 2.0


@pytest.mark.parametrize(
    ("hf", "expected"),
    [
        (LlamaConfig(attention_bias=True, mlp_bias=True), {"qkv_bias": True, "o_bias": True, "mlp_bias": True}),
        (LlamaConfig(tie_word_embeddings=True), {"qkv_bias": False, "tie_word_embeddings": True}),
        (MistralConfig(), {"sliding_window": 4096, "num_kv_heads": 8}),
        (MistralConfig(sliding_window=None), {"sliding_window": None}),
        (Qwen2Config(), {"qkv_bias": True, "o_bias": False, "qk_norm": False, "sliding_window": None}),
        (Qwen2Config(use_sliding_window=True, sliding_window=512), {"sliding_window": 512}),
        (Qwen3Config(), {"qkv_bias": False, "qk_norm": True, "head_dim": 128, "sliding_window": None}),
        (Qwen3Config(attention_bias=True), {"qkv_bias": True, "o_bias": True, "mlp_bias": False}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_families(hf: Any, expected: dict[str, Any]) -> None:
    data = hf.to_dict() | {"architectures": [type(hf).__name__.replace("Config", "ForCausalLM")]}
    parsed = describe(data)
    assert {name: getattr(parsed, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "param", "text"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architectures", "LlamaForCausalLM"),
        ({"architectures": None}, "architectures", "got nothing"),
        ({"hidden_size": None}, "hidden_size", "required"),
        ({"num_hidden_layers": 0}, "num_hidden_layers", "positive"),
        ({"vocab_size": "many"}, "vocab_size", "integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads", "does not divide"),
        ({"head_dim": 7}, "head_dim", "even"),
        ({"head_dim": 512}, "head_dim", "256"),
        ({"hidden_act": "gelu"}, "hidden_act", "silu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config", "not supported"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types", "linear_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor", "1.0"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling.rope_type", "llama3"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "long_factor", "list of positive"),
        (
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [2.0] * 4, "short_factor": [1.0] * 4}},
            "short_factor",
            "not supported",
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "rope_scaling.mrope_section", "default"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9.0}}, "rope_scaling.alpha", "dynamic"),
        ({"rope_scaling": {"factor": 2.0}}, "factor", "rope_type"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": {"rope_theta": 1e6}},
            "rope_scaling",
            "differs from rope_parameters",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters", "flat"),
        ({"rope_scaling": {"type": "linear"}}, "factor", "required"),
        ({"rope_scaling": [1]}, "rope_scaling", "flat"),
        ({"rope_parameters": "yarn"}, "rope_parameters", "flat"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps", "positive"),
        ({"dtype": "float8_e4m3fn"}, "dtype", "bfloat16"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        config(**changes)
    assert caught.value.param == param
    assert param.split(".")[-1] in caught.value.message


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "yarn", "factor": 2.0}, 1024),
        ({"type": "dynamic", "factor": 4.0}, 512),
        ({"type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, 512),
    ],
)
def test_max_seq_len_is_what_the_angles_are_made_for(rope: dict[str, Any] | None, longest: int) -> None:
    scaled = config(rope_scaling=rope)
    assert choose_max_seq_len(llm_args(), scaled) == longest
    assert choose_max_seq_len(llm_args(max_seq_len=100), scaled) == 100
    with pytest.raises(ConfigError, match=f"at most {longest}") as caught:
        choose_max_seq_len(llm_args(max_seq_len=longest + 1), scaled)
    assert caught.value.param == "max_seq_len"
    assert rope is None or f"with its {rope['type']} rope scaling" in caught.value.message


def test_the_original_length_outside_the_scaling_comes_first_as_in_transformers() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 128}
    assert config(rope_parameters=yarn, original_max_position_embeddings=64).rope.original_max_position == 64


def test_a_window_that_no_layer_has_limits_nothing() -> None:
    facts = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64}
    assert describe({**facts, "max_window_layers": 2}).sliding_window is None
    assert describe({**facts, "max_window_layers": 1}).sliding_window == 64


def test_a_sliding_window_limits_the_length_and_is_named() -> None:
    windowed = describe({**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": 128})
    assert choose_max_seq_len(llm_args(max_seq_len=128), windowed) == 128
    with pytest.raises(ConfigError, match="sliding_window of 128"):
        choose_max_seq_len(llm_args(), windowed)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="asks about x86 instructions")
@pytest.mark.parametrize(
    ("saved", "instructions", "expected"),
    [
        ("bfloat16", {"avx512_bf16"}, torch.bfloat16),
        ("bfloat16", {"amx_tile"}, torch.bfloat16),
        ("bfloat16", set(), torch.float32),
        ("float32", {"avx512_bf16", "amx_tile"}, torch.float32),
    ],
)
def test_auto_dtype_on_a_cpu(
    saved: str, instructions: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in instructions)
    assert choose_dtype(llm_args(), config(dtype=saved), CPU) == expected
    assert choose_dtype(llm_args(dtype="bfloat16"), config(torch_dtype=saved), CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("saved", "expected"), [("float32", torch.bfloat16), ("float16", torch.float16), ("bfloat16", torch.bfloat16)]
)
def test_auto_dtype_on_a_gpu(saved: str, expected: torch.dtype) -> None:
    assert choose_dtype(llm_args(), config(dtype=saved), torch.device("cuda")) == expected


@NO_CUDA
def test_a_gpu_that_is_not_there() -> None:
    assert choose_device(llm_args()) == CPU
    with pytest.raises(ConfigError, match="no CUDA GPU") as caught:
        choose_device(llm_args(device="cuda"))
    assert caught.value.param == "device"


def test_attention_backends() -> None:
    assert choose_attention(llm_args(), CPU) == choose_attention(llm_args(attn_backend="TORCH"), CPU) == "torch"
    assert choose_attention(llm_args(attn_backend="TORCH"), torch.device("cuda")) == "torch"
    assert choose_attention(llm_args(), torch.device("cuda")) == "triton"
    with pytest.raises(ConfigError, match="TORCH") as caught:
        choose_attention(llm_args(attn_backend="TRITON"), CPU)
    assert caught.value.param == "attn_backend"


def test_a_backend_that_declines_what_a_model_needs_is_named() -> None:
    with pytest.raises(ConfigError, match="TRITON can't serve this model: Triton needs a GPU") as caught:
        AttentionKind(Builder(torch.float32, CPU, attention="triton"), 4, 2, 8)
    assert caught.value.param == "attn_backend"


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(1, 1), (16, 1), (17, 2)])
def test_a_pool_of_max_tokens(max_tokens: int, num_blocks: int) -> None:
    cache = KvCacheConfig(max_tokens=max_tokens, tokens_per_block=16)
    num_fitting = fitting_blocks([demand()], cache, torch.bfloat16, CPU)
    pool = KvPool.allocate(demand().share, 16, num_fitting, torch.bfloat16, CPU)
    assert pool.tensor.shape == (num_blocks, 2, 2, 2, 16, 8)
    assert (pool.num_blocks, pool.tokens_per_block) == (num_blocks, 16)
    assert pool.block_bytes == 16 * kv_bytes_per_token(2)
    assert not pool.tensor.any()
    assert margins(pool.tensor) is not None, "without, no peer reads it in place"


def test_a_pool_of_cpu_memory() -> None:
    cache = KvCacheConfig(cpu_memory_bytes=1 << 20, tokens_per_block=16)
    block_bytes = 16 * kv_bytes_per_token(4)
    assert fitting_blocks([demand()], cache, torch.float32, CPU) == (1 << 20) // block_bytes
    assert fitting_blocks([demand()], cache, torch.float32, CPU, num_ranks=2) == (1 << 19) // block_bytes


@pytest.mark.parametrize(
    ("max_tokens", "num_blocks"), [(None, 12), (16, 1), (12 * 16, 12), (12 * 16 + 1, 12), (10**12, 12)]
)
def test_of_a_fraction_and_max_tokens_the_smaller_counts(
    max_tokens: int | None, num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = 16 * kv_bytes_per_token(2)
    monkeypatch.setattr(kv_pool, "_free_bytes", lambda device: 1000 + 25 * block_bytes)
    cache = KvCacheConfig(max_tokens=max_tokens, free_gpu_memory_fraction=0.5, tokens_per_block=16)
    cuda = torch.device("cuda")
    assert fitting_blocks([demand()], cache, torch.bfloat16, cuda, reserve_bytes=1000) == num_blocks


@pytest.mark.parametrize(("max_tokens", "num_blocks"), [(16, 1), (10**12, 8)])
def test_of_two_bounds_on_a_cpu_the_smaller_counts(max_tokens: int, num_blocks: int) -> None:
    cpu_memory_bytes = 8 * 1024 * kv_bytes_per_token(4)
    cache = KvCacheConfig(max_tokens=max_tokens, cpu_memory_bytes=cpu_memory_bytes, tokens_per_block=1024)
    assert fitting_blocks([demand()], cache, torch.float32, CPU) == num_blocks


BLOCK_BYTES = 4 * 2 * 4 * 256 * 8


def windowed(window: int | None, max_seq_len: int = 64) -> Demand:
    """Of blocks of `BLOCK_BYTES` in float64, served in batches of two, with steps of 16 tokens and blocks of 4."""
    spec = CacheSpec("full" if window is None else "window", 1, 256, window)
    share = CacheShare(CacheGroup(spec, (0, 1, 2, 3)), range(4), range(1))
    settings = {"max_batch_size": 2, "max_num_tokens": 16, "kv_cache_config": KvCacheConfig(tokens_per_block=4)}
    return Demand.of(share, llm_args(**settings), max_seq_len)


def test_a_window_needs_no_more_blocks_than_its_sequences_can_use() -> None:
    assert windowed(None).num_blocks(1000) == 1000
    assert [windowed(9).num_blocks(count) for count in (10, 1000)] == [10, 2 * (7 + 1)]
    assert windowed(9, max_seq_len=401).num_blocks(1000) == 101, "the longest sequence takes all its blocks at once"


@pytest.mark.parametrize(
    ("windows", "budget_blocks", "num_blocks"),
    [
        # A window of 9 tokens needs 2 x 8 blocks at most, one of 33 tokens 2 x 14.
        ([None, 9], 20, [10, 10]),
        ([None, 9], 116, [100, 16]),
        ([9, None, None, 33], 50 + 50 + 16 + 28, [16, 50, 50, 28]),
        ([9, 33], 1000, [16, 28]),
    ],
)
def test_what_windows_leave_is_for_the_others(
    windows: list[int | None], budget_blocks: int, num_blocks: list[int]
) -> None:
    cache = KvCacheConfig(cpu_memory_bytes=budget_blocks * BLOCK_BYTES, tokens_per_block=4)
    demands = [windowed(each) for each in windows]
    num_fitting = fitting_blocks(demands, cache, torch.float64, CPU)
    assert [each.num_blocks(num_fitting) for each in demands] == num_blocks


@pytest.mark.parametrize(
    ("batch_sizes", "max_batch_size", "captured"),
    [((1, 3000), None, [1, 16]), ((4, 8), None, [4, 8]), ((4, 8, 32), 6, [4, 6]), (None, 64, [1, 2, 4, 8, 16])],
)
def test_a_graph_size_that_no_batch_has_stands_for_the_largest(
    batch_sizes: tuple[int, ...] | None, max_batch_size: int | None, captured: list[int]
) -> None:
    assert capture_sizes(CudaGraphConfig(batch_sizes=batch_sizes, max_batch_size=max_batch_size), 16) == captured


def test_graphs_are_captured_over_lengths_that_the_device_knows() -> None:
    cuda = torch.device("cuda")
    assert choose_graphs(llm_args(), cuda) == CudaGraphConfig()
    assert choose_graphs(llm_args(attn_backend="TORCH"), cuda) is None
    assert choose_graphs(llm_args(cuda_graph_config=None), cuda) is None
    assert choose_graphs(llm_args(), CPU) is None


@pytest.mark.parametrize(
    ("cache", "param"),
    [
        (KvCacheConfig(max_tokens=10**12), "kv_cache_config.max_tokens"),
        (KvCacheConfig(cpu_memory_bytes=1 << 20, tokens_per_block=1024), "kv_cache_config.cpu_memory_bytes"),
    ],
)
def test_a_pool_that_does_not_fit(cache: KvCacheConfig, param: str) -> None:
    wide = demand(num_hidden_layers=64, num_key_value_heads=8, head_dim=128)
    with pytest.raises(ConfigError) as caught:
        fitting_blocks([wide], cache, torch.float32, CPU)
    assert caught.value.param == param

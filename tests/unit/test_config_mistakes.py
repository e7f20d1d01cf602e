"""What a wrong key or value is answered with: one short line a fault, and a hint only where it is right."""

from __future__ import annotations

from typing import Any

import pytest

from pdserve.config import ClusterConfig, load
from pdserve.config.mistakes import suggestion
from pdserve.config.schema import all_keys, field_at
from pdserve.config.sources import help_of_keys
from pdserve.errors import ConfigError
from pdserve.llm import LLM


def mistake(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load([], ["--model=m", *(f"--{override}" for override in overrides)])
    return caught.value.message


def test_three_unknown_keys_are_three_short_lines() -> None:
    lines = mistake("backend=UCX", "context_servers.nonsense=1", "kv_cache_config.what=2").splitlines()
    keys = ["backend", "context_servers.nonsense", "kv_cache_config.what"]
    assert sorted(line.partition(":")[0] for line in lines) == keys
    assert all(len(line) <= 200 for line in lines)


def test_long_values_do_not_make_long_lines() -> None:
    lines = mistake(f"dtype={'x' * 5000}", f"context_servers.{'k' * 3000}=1", "disagg_cluster.heartbeat_interval_sec=9")
    assert len(lines.splitlines()) == 3
    assert all(len(line) <= 200 for line in lines.splitlines())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("num_instances", None),  # of which pool?
        ("backend", None),
        ("attn_backnd", "attn_backend"),
        ("prot", "port"),
        ("max_tokens", None),
        ("tokens_per_block", "kv_cache_config.tokens_per_block"),
        ("context_servers.tokens_per_block", "context_servers.kv_cache_config.tokens_per_block"),
        ("tensor-parallel-size", "tensor_parallel_size"),
        ("max_model_len", "max_seq_len"),
        ("generation_servers.max-model-len", "generation_servers.max_seq_len"),
        ("gpu_memory_utilization", "kv_cache_config.free_gpu_memory_fraction"),
        ("context_servers.gpu_memory_utilization", "context_servers.kv_cache_config.free_gpu_memory_fraction"),
        ("served_model_name", "proxy.served_model_name"),
        ("cuda_graph_config.batch_size", "cuda_graph_config.batch_sizes"),
        ("kv_cache_config.block_size", "kv_cache_config.tokens_per_block"),
        ("nonsense.deeper", None),
        ("wholly_different", None),
    ],
)
def test_a_hint_is_given_only_where_it_is_right(key: str, meant: str | None) -> None:
    found = suggestion(key.split("."), ClusterConfig)
    assert found == (None if meant is None else tuple(meant.split(".")))


def test_keys_of_an_optional_section_are_its_own() -> None:
    message = mistake("cuda_graph_config.nonsense=1")
    assert message == "cuda_graph_config.nonsense: unknown key; allowed: batch_sizes, max_batch_size, enable_padding"


def test_every_name_of_other_servers_leads_to_a_key_that_exists() -> None:
    from pdserve.config.mistakes import _NAMES_ELSEWHERE
    from pdserve.config.schema import annotation_at

    for name, place in _NAMES_ELSEWHERE.items():
        assert annotation_at(ClusterConfig, place) is not None, name
        assert name not in ClusterConfig.model_fields


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_model_len": 5}, "max_model_len: unknown key; did you mean max_seq_len?"),
        ({"tensor_paralel_size": 2}, "tensor_paralel_size: unknown key; did you mean tensor_parallel_size?"),
        ({"kv_cache_config": {"max_tokns": 2}}, "kv_cache_config.max_tokns: unknown key; did you mean max_tokens?"),
        ({"backend": "pytorch"}, "backend: unknown key; `pdserve config --help` lists all"),
        ({"dtype": "int3"}, "dtype: Input should be 'auto', 'float16', 'bfloat16' or 'float32', got 'int3'"),
    ],
)
def test_llm_gives_the_hints_of_the_command(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM("m", **arguments)
    assert caught.value.message == said
    key = said.partition(":")[0]
    assert caught.value.param == key


def test_all_keys_are_listed_with_type_meaning_default_and_bounds() -> None:
    text = help_of_keys()
    listed = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    assert {".".join(key) for key in all_keys(ClusterConfig)} <= listed
    words = " ".join(text.split())
    assert "--model str a Hugging Face folder, a .gguf file, or smollm2-135m-instruct" in words
    assert "the packaged demo model (required)" in words
    assert "--kv_cache_config.tokens_per_block int tokens of a block (default: 32) [>= 1, <= 1024]" in words
    assert "--kv_cache_config.free_gpu_memory_fraction float the pool's share" in words
    assert "(default: 0.9) [> 0, < 1]" in words
    assert "--kv_cache_config.dtype {auto,fp8} auto: the model's type" in words
    assert "--generation_servers.kv_cache_config.dtype {auto,fp8} --" in words, "as at the top level"
    assert "--disagg_cluster.minimal_instances.context_servers int context workers (default: 1) [>= 0]" in words
    assert "--skip_tokenizer_init [bool]" in words


def test_every_key_says_what_it_means() -> None:
    for key in all_keys(ClusterConfig):
        field = field_at(ClusterConfig, key)
        assert field is not None
        assert field.description, key

"""Configuration: sources and their order, inheritance, and what a mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from pdserve.config import ClusterUri, LlmArgs, load, masked
from pdserve.engine.schedule.options import EngineOptions
from pdserve.errors import ConfigError


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_files_merge_deeply_and_in_order(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "model: m\nkv_cache_config: {max_tokens: 1, tokens_per_block: 8}\n")
    second = write(tmp_path, "b.yaml", "kv_cache_config: {max_tokens: 2}\nport: 1234\n")
    config = load([first, second])
    assert config.kv_cache_config.max_tokens == 2
    assert config.kv_cache_config.tokens_per_block == 8
    assert config.port == 1234


def test_flags_beat_environment_beats_files_beats_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "a.yaml", "model: m\nport: 1\nhostname: file\nlog_level: error\n")
    environment = {"PDSERVE_PORT": "2", "PDSERVE_HOSTNAME": "variable", "PDSERVE_PROXY__MAX_RETRIES": "7"}
    config = load([file], ["--port=3"], environment)
    assert (config.port, config.hostname, config.log_level) == (3, "variable", "error")
    assert config.proxy.max_retries == 7
    assert config.disagg_cluster.cluster_uri == "memory://"


def test_pools_inherit_engine_keys_and_their_own_win(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "a.yaml",
        "model: m\nmax_batch_size: 8\nkv_cache_config: {max_tokens: 64, tokens_per_block: 16}\n"
        "generation_servers: {num_instances: 3, max_batch_size: 99, kv_cache_config: {max_tokens: 128}}\n",
    )
    config = load([file], ["--context_servers.dtype=float32"])
    assert config.context_servers.max_batch_size == 8
    assert config.context_servers.dtype == "float32"
    assert config.generation_servers.model == "m"
    assert config.generation_servers.num_instances == 3
    assert config.generation_servers.max_batch_size == 99
    assert config.generation_servers.kv_cache_config.max_tokens == 128
    assert config.generation_servers.kv_cache_config.tokens_per_block == 16
    assert config.generation_servers.dtype == "auto"


@pytest.mark.parametrize(
    ("override", "path", "said"),
    [
        ("generation_servers.num_instnces=3", "generation_servers.num_instnces", "did you mean num_instances"),
        ("context_servers.num_instances=abc", "context_servers.num_instances", "valid integer"),
        ("context_servers.num_instances=-1", "context_servers.num_instances", "greater than or equal to 0"),
        ("cache_transceiver_config.backend=MPI", "cache_transceiver_config.backend", "allowed: DEFAULT, UCX, NIXL"),
        ("dtype=int3", "dtype", "'float16'"),
        ("kv_cache_config.dtype=int8", "kv_cache_config.dtype", "'fp8'"),
        ("scheduler_config.waiting_queue_policy=sjf", "scheduler_config.waiting_queue_policy", "'FCFS'"),
        ("scheduler_config.capacity_scheduler_policy=X", "scheduler_config.capacity_scheduler_policy", "STATIC_BATCH"),
        ("batch_wait_timeout_ms=-1", "batch_wait_timeout_ms", "greater than or equal to 0"),
        ("stream_interval=0", "stream_interval", "greater than or equal to 1"),
        ("port=99999", "port", "65535"),
        ("kv_cache_config=5", "kv_cache_config", "dictionary"),
        ("disagg_cluster.cluster_uri=redis://x", "disagg_cluster.cluster_uri", "etcd://"),
        ("disagg_cluster.cluster_uri=etcd://x", "disagg_cluster.cluster_uri", "host:port"),
        ("disagg_cluster.heartbeat_interval_sec=100", "disagg_cluster", "at least twice"),
        ("scheduler_config.max_mixed_prefill_tokens=0", "scheduler_config.max_mixed_prefill_tokens", "or equal to 1"),
        (
            "conditional_disagg_config.max_local_prefill_length=-1",
            "conditional_disagg_config.max_local_prefill_length",
            "greater than or equal to 0",
        ),
        (
            "conditional_disagg_config.max_context_queue=1",
            "conditional_disagg_config.max_context_queue",
            "did you mean max_context_queue_tokens",
        ),
        (
            "generation_servers.conditional_disagg_config.max_local_prefill_length=1",
            "generation_servers.conditional_disagg_config",
            "unknown key",
        ),
        ("nonsense=1", "nonsense", "unknown key"),
    ],
)
def test_a_mistake_names_the_path_and_what_is_allowed(override: str, path: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], ["--model=m", f"--{override}"])
    assert caught.value.param == path
    assert caught.value.message.startswith(f"{path}: ")
    assert said in caught.value.message
    assert caught.value.message.count(path) == 1, "an inherited key is reported once"


def test_the_schedulers_keys_reach_the_engine() -> None:
    changes = {
        "scheduler_config.capacity_scheduler_policy": "MAX_UTILIZATION",
        "scheduler_config.context_chunking_policy": "EQUAL_PROGRESS",
        "scheduler_config.waiting_queue_policy": "fcfs",
        "scheduler_config.max_mixed_prefill_tokens": "512",
        "kv_cache_config.copy_on_partial_reuse": "false",
        "batch_wait_timeout_ms": "2.5",
        "stream_interval": "4",
    }
    config = load([], ["--model=m", *(f"--{key}={value}" for key, value in changes.items())])
    assert EngineOptions.from_args(config.generation_servers) == EngineOptions(
        capacity_policy="MAX_UTILIZATION",
        chunking_policy="EQUAL_PROGRESS",
        max_mixed_prefill_tokens=512,
        copy_on_partial_reuse=False,
        batch_wait_s=0.0025,
        stream_interval=4,
    )
    assert EngineOptions.from_args(LlmArgs(model="m")) == EngineOptions()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kv_cache_config": {"host_cache_size": 1, "onboard_blocks": False}}, "can't be used where they are"),
        ({"kv_cache_config": {"host_cache_size": 1, "enable_block_reuse": False}}, "needs enable_block_reuse"),
        (
            {"scheduler_config": {"context_chunking_policy": "EQUAL_PROGRESS"}, "enable_chunked_prefill": False},
            "needs enable_chunked_prefill",
        ),
        (
            {"scheduler_config": {"max_mixed_prefill_tokens": 512}, "enable_chunked_prefill": False},
            "max_mixed_prefill_tokens needs enable_chunked_prefill",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        LlmArgs.model_validate({"model": "m", **settings})


WHOLE_PROMPTS = [
    "--model=m",
    "--generation_servers.enable_chunked_prefill=false",
    "--generation_servers.max_num_tokens=100",
]


@pytest.mark.parametrize("setting", ["max_context_queue_tokens=0", "max_local_prefill_length=101"])
def test_prompts_that_generation_workers_would_refuse_are_not_sent_there(setting: str) -> None:
    setting = f"--conditional_disagg_config.{setting}"
    with pytest.raises(ConfigError, match=r"generation_servers\.enable_chunked_prefill") as caught:
        load([], [*WHOLE_PROMPTS, setting])
    assert caught.value.param == "conditional_disagg_config"
    load([], ["--model=m", setting])
    load([], [*WHOLE_PROMPTS, setting, "--context_servers.num_instances=0"])
    load([], [*WHOLE_PROMPTS, "--conditional_disagg_config.max_local_prefill_length=100"])


def test_a_missing_model_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"^model: required$"):
        load()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: a\nmodel: b\n", "line 2: the key 'model' is given twice"),
        ("model: [", "is not YAML"),
        ("- 1\n", "a mapping of keys was expected"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([write(tmp_path, "a.yaml", text)])
    assert said in caught.value.message


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load([tmp_path / "none.yaml"])


def test_passwords_are_masked_everywhere() -> None:
    config = load([], ["--model=m", "--disagg_cluster.cluster_uri=etcd://root:s3cret@a:1,b:2"])
    printed = yaml.safe_dump(masked(config))
    assert "s3cret" not in printed
    assert "etcd://root:***@a:1,b:2" in printed
    with pytest.raises(ConfigError) as caught:
        load([], ["--model=m", "--disagg_cluster.cluster_uri=etcd://root:s3cret@a"])
    assert "s3cret" not in caught.value.message


def test_cluster_uri() -> None:
    assert ClusterUri.parse("memory://").scheme == "memory"
    uri = ClusterUri.parse("etcd://u:p@h1:2379,h2:2380")
    assert uri == ClusterUri("etcd", ("h1:2379", "h2:2380"), "u", "p")


def test_the_printed_configuration_loads_back_to_itself(tmp_path: Path) -> None:
    config = load([], ["--model=m", "--generation_servers.num_instances=2"])
    file = write(tmp_path, "printed.yaml", yaml.safe_dump(masked(config)))
    assert load([file]) == config


def test_configuration_is_frozen() -> None:
    config = load([], ["--model=m"])
    with pytest.raises(ValueError, match="frozen"):
        config.port = 1  # type: ignore[misc]


def test_a_pool_without_instances_needs_none_to_be_ready() -> None:
    minimal = load([], ["--model=m", "--context_servers.num_instances=0"]).disagg_cluster.minimal_instances
    assert (minimal.context_servers, minimal.generation_servers) == (0, 1)
    asked = ["--model=m", "--context_servers.num_instances=0", "--disagg_cluster.minimal_instances.context_servers=2"]
    assert load([], asked).disagg_cluster.minimal_instances.context_servers == 2

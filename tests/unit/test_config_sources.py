"""How files, variables and flags are read: text as it is written, YAML's means of sharing, and Kubernetes beside."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from pdserve.config import ClusterConfig, load, masked
from pdserve.errors import ConfigError, HostError

KUBERNETES = {
    "PDSERVE_PORT": "tcp://10.0.0.1:8000",
    "PDSERVE_SERVICE_HOST": "10.0.0.1",
    "PDSERVE_SERVICE_PORT": "8000",
    "PDSERVE_SERVICE_PORT_HTTP": "8000",
    "PDSERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "PDSERVE_PORT_8000_TCP_PROTO": "tcp",
    "PDSERVE_PORT_8000_TCP_PORT": "8000",
    "PDSERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    # Of a service named pdserve-manager.
    "PDSERVE_MANAGER_PORT": "tcp://10.0.0.2:8001",
    "PDSERVE_MANAGER_SERVICE_HOST": "10.0.0.2",
    "PDSERVE_MANAGER_PORT_8001_TCP_ADDR": "10.0.0.2",
}


def read(folder: Path, text: str) -> ClusterConfig:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return load([file])


def test_variables_of_a_kubernetes_service_are_no_settings(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = load([], ["--model=m"], KUBERNETES)
    assert (config.port, config.manager.port) == (8000, 8001)
    assert len(caplog.messages) == 1
    assert "PDSERVE_PORT," in caplog.messages[0]


def test_a_port_is_still_a_setting_beside_them() -> None:
    assert load([], ["--model=m"], {**KUBERNETES, "PDSERVE_PORT": "9000"}).port == 9000
    with pytest.raises(ConfigError, match="port: Input should be a valid integer"):
        load([], ["--model=m"], {"PDSERVE_PORT": "http://10.0.0.1:8000"})


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("PDSERVE_PROT", "did you mean PDSERVE_PORT?"),
        ("PDSERVE_CONTEXT_SERVERS__NUM_INSTNCES", "did you mean PDSERVE_CONTEXT_SERVERS__NUM_INSTANCES?"),
        ("PDSERVE_MAX_MODEL_LEN", "did you mean PDSERVE_MAX_SEQ_LEN?"),
        ("PDSERVE_CONTEXT_SERVERS_PORT", "did you mean PDSERVE_CONTEXT_SERVERS__PORT?"),
        ("PDSERVE_PORT__X", "`pdserve config --help` lists all keys"),
    ],
)
def test_a_misspelt_variable_is_an_error_with_a_hint(variable: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], ["--model=m"], {variable: "1"})
    assert caught.value.param == variable
    assert caught.value.message.startswith(f"{variable}: ")
    assert said in caught.value.message


def test_variables_that_are_not_settings_pass() -> None:
    assert load([], ["--model=m"], {"PDSERVE_CACHE": "/x", "_PDSERVE_INSTANCE": "1", "HOME": "/", "PDSERVE_PORT": ""})


def test_null_is_null_everywhere(tmp_path: Path) -> None:
    environment = {
        "PDSERVE_CUDA_GRAPH_CONFIG": "null",
        "PDSERVE_HANG_DETECTION_TIMEOUT": "null",
        "PDSERVE_GENERATION_SERVERS__TOKENIZER": "null",
    }
    config = load(
        [], ["--model=m", "--tokenizer=t", "--kv_cache_config.max_tokens=null", "--pp_partition=null"], environment
    )
    assert config.cuda_graph_config is None
    assert config.hang_detection_timeout is None
    assert config.kv_cache_config.max_tokens is None
    assert config.pp_partition is None
    assert (config.context_servers.tokenizer, config.generation_servers.tokenizer) == ("t", None)
    assert read(tmp_path, "model: m\ncuda_graph_config: null\ntokenizer: ~\n").cuda_graph_config is None


@pytest.mark.parametrize("name", ["123", "007", "1.50", "1e3", "on", "no", "2024-01-01", "0x1F", "12:30:45", "1_000"])
def test_names_are_as_they_are_written(tmp_path: Path, name: str) -> None:
    text = f"model: {name}\ndisagg_cluster: {{cluster_name: a{name[0]}}}\nproxy: {{served_model_name: {name}}}\n"
    config = read(tmp_path, text)
    assert (config.model, config.proxy.served_model_name, config.context_servers.model) == (name, name, name)
    assert load([], [f"--model={name}"]).model == name
    assert load([], [], {"PDSERVE_MODEL": name}).model == name


def test_a_number_is_a_name_where_a_name_is_wanted_and_a_number_elsewhere(tmp_path: Path) -> None:
    config = read(tmp_path, "model: 1\nport: 2\ndisagg_cluster: {cluster_name: 3}\nlog_level: 'debug'\n")
    assert (config.model, config.port, config.disagg_cluster.cluster_name) == ("1", 2, "3")


def test_text_of_a_flag_is_no_yaml() -> None:
    config = load([], ["--model=/models/a: b #1", "--hostname='quoted'", "--tokenizer=*x"])
    assert (config.model, config.hostname, config.tokenizer) == ("/models/a: b #1", "quoted", "*x")


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "model: m\n"
        "context_servers: &pool {num_instances: 2, max_batch_size: 7, kv_cache_config: &cache {max_tokens: 64}}\n"
        "generation_servers:\n  <<: *pool\n  num_instances: 3\n",
    )
    assert config.context_servers.num_instances == 2
    assert (config.generation_servers.num_instances, config.generation_servers.max_batch_size) == (3, 7)
    assert config.generation_servers.kv_cache_config.max_tokens == 64
    both = read(
        tmp_path,
        "model: &name 123\nkv_cache_config: &a {max_tokens: 1}\ncontext_servers: {tokenizer: *name}\n"
        "generation_servers:\n  kv_cache_config:\n    <<: [{tokens_per_block: 8}, *a]\n",
    )
    assert both.context_servers.tokenizer == "123"
    assert both.generation_servers.kv_cache_config.max_tokens == 1
    assert both.generation_servers.kv_cache_config.tokens_per_block == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: m\nkv_cache_config:\n  max_tokens: 1\n  max_tokens: 2\n",
            "line 4: the key 'max_tokens' is given twice",
        ),
        ("model: m\ncontext_servers: &p {port: 1}\ngeneration_servers: {<<: *p, <<: *p}\n", "'<<' is given twice"),
        ("model: m\n'model': n\n", "line 2: the key 'model' is given twice"),
        ("model: m\n? [1, 2]\n: 3\n", "line 2: a key must be text"),
        ("model: m\n1: 2\n", "1: unknown key"),
        ("model: *nobody\n", "line 1: found undefined alias"),
        ("model: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        ("model: m\nport: 2024-13-45\n", "month must be in 1..12"),
        ("model: \x01\n", "is not YAML"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_a_file_that_the_system_can_t_read_now_is_not_called_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptors(_: Path) -> bytes:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "read_bytes", no_descriptors)
    with pytest.raises(HostError, match="Too many open files"):
        load([tmp_path / "cluster.yaml"])


def test_a_key_beats_the_section_that_is_given_whole(tmp_path: Path) -> None:
    whole, one = "kv_cache_config={max_tokens: 1, tokens_per_block: 8}", "kv_cache_config.max_tokens=2"
    for above, below in ((f"--{whole}", f"--{one}"), (f"--{one}", f"--{whole}")):
        cache = load([], ["--model=m", above, below]).kv_cache_config
        assert (cache.max_tokens, cache.tokens_per_block) == (2, 8)
    environment = {"PDSERVE_KV_CACHE_CONFIG__MAX_TOKENS": "2", "PDSERVE_KV_CACHE_CONFIG": "{tokens_per_block: 8}"}
    file = tmp_path / "a.yaml"
    file.write_text("kv_cache_config: {max_tokens: 1, dtype: fp8}")
    cache = load([file], ["--model=m"], environment).kv_cache_config
    assert (cache.max_tokens, cache.tokens_per_block, cache.dtype) == (2, 8, "fp8")


def test_flags() -> None:
    flags = ["--port=1", "--max_batch_size", "2", "--skip_tokenizer_init", "--kv_cache_config.max_tokens", "3"]
    flags += ["--cuda_graph_config.batch_sizes=1,2,4", "--pp_partition", "3", "--enable_chunked_prefill", "false"]
    flags += ["--context_servers={num_instances: 5, kv_cache_config: {tokens_per_block: 8}}", "--model", "-x"]
    config = load([], flags)
    assert (config.port, config.max_batch_size, config.skip_tokenizer_init, config.model) == (1, 2, True, "-x")
    assert config.kv_cache_config.max_tokens == 3
    assert config.cuda_graph_config is not None
    assert config.cuda_graph_config.batch_sizes == (1, 2, 4)
    assert config.pp_partition == (3,)
    assert not config.enable_chunked_prefill
    assert config.context_servers.num_instances == 5
    assert config.context_servers.kv_cache_config.tokens_per_block == 8
    assert load([], ["--model=m", "--cuda_graph_config.batch_sizes=[8]"]).cuda_graph_config is not None
    assert load([], ["--model=m", "--skip_tokenizer_init", "--port", "4"]).port == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port"], "--port: a value is missing"),
        (["--port", "--model=m"], "--port: a value is missing"),
        (["nonsense"], "expected --dotted.key=value"),
        (["--=3"], "expected --dotted.key=value"),
    ],
)
def test_flags_that_say_nothing_are_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], flags)
    assert said in caught.value.message


@pytest.mark.parametrize("password", ["a/b", "p@ss", "x:y@z/w", "p@a:1"])
def test_passwords_are_masked_whatever_they_hold(password: str) -> None:
    uri = f"--disagg_cluster.cluster_uri=etcd://root:{password}@a:1"
    printed = yaml.safe_dump(masked(load([], ["--model=m", uri])))
    assert "etcd://root:***@a:1" in printed
    with pytest.raises(ConfigError) as caught:
        load([], ["--model=m", uri.removesuffix(":1")])
    assert password not in caught.value.message


@pytest.mark.parametrize("model", ["/models/🙂 ü", "123", "null", "a: b", "true", "x\x7fy", "*a", "'"])
def test_what_children_are_given_is_what_was_meant(tmp_path: Path, model: str) -> None:
    config = ClusterConfig.model_validate({"model": model, "kv_cache_config": {"free_gpu_memory_fraction": 0.00001}})
    text = yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True)
    assert read(tmp_path, text) == config

"""The model of the soak: so small that a step takes a millisecond, with weights drawn by its seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 500


def write_model(folder: Path) -> Path:
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def configuration(model: Path, ports: tuple[int, int], etcd_uri: str, places: int) -> dict[str, Any]:
    """A cluster with room for `places` workers of each role, the first of which are there all the time."""
    proxy_port, manager_port = ports
    return {
        "model": str(model),
        "load_format": "DUMMY",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "hostname": "localhost",
        "port": proxy_port,
        "max_batch_size": 16,
        "max_num_tokens": 256,
        "kv_cache_config": {"max_tokens": 4096},
        "cache_transceiver_config": {"checksum": True},
        "context_servers": {"num_instances": places},
        "generation_servers": {"num_instances": places},
        "manager": {"port": manager_port},
        "disagg_cluster": {
            "cluster_uri": etcd_uri,
            "heartbeat_interval_sec": 0.5,
            "inactive_timeout_sec": 3,
            "drain_timeout_sec": 5,
            "minimal_instances": {"context_servers": 1, "generation_servers": 1},
        },
    }

"""What the proxy reads from a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.generation_defaults import GenerationDefaults
from proxy.model_loading import load_model
from proxy.parsers import REASONING_FORMATS, TOOL_FORMATS
from tests.fakes.proxy_cluster import TEMPLATE, byte_level_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 512, "eos_token_id": 0}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_k": 20, "eos_token_id": [2]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    byte_level_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config(folder: Path, **keys: Any) -> ClusterConfig:
    return ClusterConfig.model_validate({"model": str(folder), "context_servers": {}, "generation_servers": {}, **keys})


def test_a_complete_folder(folder: Path) -> None:
    model = load_model(config(folder))
    assert model.name == folder.name
    assert model.defaults == GenerationDefaults(eos_token_ids=(0, 2), temperature=0.6, top_k=20)
    assert model.eos_token_ids == {0, 2}
    assert model.vocab_size == 512, "the model's, which is padded"
    assert model.template is not None
    assert model.template.render([{"role": "user", "content": "x"}]).endswith("assistant\n")


def test_a_folder_without_tokenizer_and_one_that_is_not_wanted(folder: Path, tmp_path: Path) -> None:
    assert load_model(config(folder, skip_tokenizer_init=True)).tokenizer is None
    (tmp_path / "tokenizer.json").unlink()
    model = load_model(config(folder, proxy={"served_model_name": "shape"}))
    assert (model.name, model.tokenizer, model.template) == ("shape", None, None)


def test_formats_of_calls_and_reasoning_are_those_of_the_configuration(folder: Path) -> None:
    model = load_model(config(folder))
    assert (model.tools, model.reasoning) == (None, None)
    model = load_model(config(folder, proxy={"tool_parser": "hermes", "reasoning_parser": "qwen3"}))
    assert (model.tools, model.reasoning) == (TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"])
    with pytest.raises(ConfigError, match=r"proxy\.tool_parser"):
        load_model(config(folder, proxy={"tool_parser": "auto"}))
    (folder / "chat_template.jinja").write_text("{{ tools }}<tool_call>{{ messages }}")
    assert load_model(config(folder, proxy={"tool_parser": "auto"})).tools is TOOL_FORMATS["hermes"]


def test_a_broken_tokenizer_is_fatal(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer"):
        load_model(config(folder))


def test_proxy_imports_no_model_code() -> None:
    import subprocess
    import sys

    heavy = "('torch', 'transformers', 'pdserve.engine', 'kv_transfer', 'pd_kernels')"
    code = f"import sys, proxy.server; sys.exit(', '.join(m for m in {heavy} if m in sys.modules) or None)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr

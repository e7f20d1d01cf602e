"""Checkpoints: what fills the parameters, and which tensor is named when one does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.engine.models import weights
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.mapping import Shard
from pdserve.engine.models.parameters import Parameters, allocate, checkpoint_slots
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.errors import ConfigError
from pdserve.model_store import read_config
from tests.unit.tiny_models import CONFIGS, Driver, args, save

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("llama-mha-biases-tied", tmp_path)
    return tmp_path


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[ModelConfig, Parameters]:
    config = ModelConfig.from_hf(read_config(folder))
    shard = Shard.of(config)
    parameters = allocate(shard, dtype, CPU)
    weights.load(folder, shard, parameters)
    return config, parameters


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Save the checkpoint again with some tensors replaced, or dropped if None."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_filled_by_exactly_one_tensor(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path, max_shard_size="40KB")
    config = ModelConfig.from_hf(read_config(tmp_path))
    shard = Shard.of(config)
    parameters = allocate(shard, torch.float32, CPU)
    slots = {name: slot.tensor for name, slot in checkpoint_slots(shard, parameters).items()}
    for slot in slots.values():
        slot.fill_(float("nan"))
    weights.load(tmp_path, shard, parameters)
    expected = dict(model.named_parameters())
    assert slots.keys() == expected.keys()
    for slot_name, slot in slots.items():
        assert torch.equal(slot, expected[slot_name]), slot_name
    total = sum(slot.numel() for slot in slots.values())
    owned = [parameters.embedding, parameters.final_norm]
    owned += [] if config.tie_word_embeddings else [parameters.lm_head]
    owned += [t for layer in parameters.layers for n in layer.__slots__ if (t := getattr(layer, n)) is not None]
    assert sum(tensor.numel() for tensor in owned) == total


def test_the_type_is_converted(folder: Path) -> None:
    _, parameters = load(folder, torch.bfloat16)
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(parameters.final_norm, stored.bfloat16())


def test_tensors_that_only_repeat_others_are_ignored(folder: Path) -> None:
    rewrite(folder, {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    _, parameters = load(folder)
    assert torch.equal(parameters.lm_head, parameters.embedding)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "lacks model.layers.1.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.sinks": torch.zeros(4)}, "unexpected tensors: model.layers.0.self_attn.sinks"),
        ({"model.norm.weight": torch.zeros(47)}, r"model.norm.weight is \[47\], config.json says \[48\]"),
        ({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, "model.norm.weight is torch.int8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, change: dict[str, torch.Tensor | None], text: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ConfigError, match=text):
        load(folder)


def test_torch_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"\.bin weights; allowed: safetensors"):
        load(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        load(folder)


def test_a_damaged_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="can't be read"):
        load(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(ConfigError, match="model-00002-of-00002"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(ConfigError, match="damaged"):
        load(folder)


def test_dummy_weights_need_the_configuration_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    prompt = list(range(20))
    scores = [Driver(ModelRunner(args(folder, load_format="dummy"))).score(prompt) for _ in range(2)]
    assert scores[0] == scores[1], "the same noise each time"
    values = torch.tensor([value for _, value in scores[0].logprobs[0].top])
    assert bool(values.isfinite().all())
    assert len(values.unique()) > 100

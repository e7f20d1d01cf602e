"""Checkpoints: what fills the parameters, and which tensor is named when one does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdserve.engine.layers.builder import Builder
from pdserve.engine.models import weights
from pdserve.engine.models.registry import describe
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.errors import ConfigError
from pdserve.model_store import read_config
from tests.unit.tiny_models import CONFIGS, Driver, args, save

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save("llama-mha-biases-tied", tmp_path)
    return tmp_path


def built(folder: Path, dtype: torch.dtype = torch.float32) -> Builder:
    """The model in `folder`, declared and filled with nothing that is a number."""
    build = Builder(dtype, CPU)
    describe(read_config(folder)).build(build)
    for tensor in tensors(build).values():
        tensor.fill_(float("nan"))
    return build


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    build = built(folder, dtype)
    weights.load(folder, build)
    return tensors(build)


def tensors(build: Builder) -> dict[str, torch.Tensor]:
    """What the rank holds, by the checkpoint's names."""
    return {name: share.tensor for name, share in build.shares.items() if share.tensor is not None}


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Save the checkpoint again with some tensors replaced, or dropped if None."""
    tensors = load_file(folder / "model.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_filled_by_exactly_one_tensor(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path, max_shard_size="40KB")
    build = built(tmp_path)
    weights.load(tmp_path, build)
    expected = dict(model.named_parameters())
    assert build.shares.keys() == expected.keys()
    for stored_name, share in build.shares.items():
        convert = share.weight.convert or (lambda stored: stored)
        assert share.tensor is not None
        assert torch.equal(share.tensor, convert(expected[stored_name])), stored_name
    owners = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(build).values()}
    assert sum(storage.nbytes() for storage in owners.values()) == build.num_bytes
    assert build.num_bytes == 4 * sum(parameter.numel() for parameter in expected.values())


def test_the_type_is_converted(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(load(folder, torch.bfloat16)["model.norm.weight"], stored.bfloat16())


def test_tensors_that_only_repeat_others_are_ignored(folder: Path) -> None:
    rewrite(folder, {"lm_head.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(6)})
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(load(folder)["model.embed_tokens.weight"], table)


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


def test_a_base_models_names_lack_their_prefix(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    whole = load(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file({**stored, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file)
    bare = load(tmp_path)
    assert bare.keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in bare.items())


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

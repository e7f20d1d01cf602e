"""The cache of converted models: each content is converted once, whatever file it lies in.

A conversion runs in a process of its own (`pdserve.model_conversion`), under a lock, and its folder is renamed into
place when complete: any number of processes may ask for the same model at once, and a conversion that dies leaves
nothing that looks finished. A folder's name ends in a hash of what was converted, so a file that was moved, copied or
installed again is not converted again. Light to import: no torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from pdserve.errors import Aborted, ConfigError, path_error
from pdserve.process import child_environment
from pdserve.progress import Progress

log = logging.getLogger(__name__)

# Raised when converted folders change, so that those of older versions are not used.
_CONVERSION_VERSION = 2
_CONVERSION_TIMEOUT_S = 1800.0
_POLL_S = 0.1
_READ_BYTES = 8 << 20
_GIB = float(1 << 30)
# What a tokenizer may be made of; weights and readmes are none of it.
_TOKENIZER_SUFFIXES = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
# How many steps `pdserve.model_conversion` names, and what such a line of its standard output begins with.
STEP_PREFIX = "step: "
_NUM_STEPS = {"gguf": 4, "tokenizer": 2}
# A file that was changed a moment ago may change again without its times telling.
_SETTLED_S = 2.0

Cancelled = Callable[[], bool]


def never() -> bool:
    return False


def converted(kind: str, source: Path, cancelled: Cancelled = never) -> Path:
    """The conversion of `source`, made now if there is none; `kind` is "gguf" or "tokenizer".

    Raises:
        ConfigError: it can't be read, or not be converted.
        Aborted: `cancelled` said so meanwhile.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        key = _content_key(kind, source, cache)
        if (found := _find(cache, key)) is not None:
            return found
        with _locked(cache / f"{key}.lock", source, cancelled):
            found = _find(cache, key)  # whoever held the lock may have made it
            return found or _convert(kind, source, cache / f"{_name(kind, source)}-{key}", cancelled)
    except OSError as error:
        raise path_error(error, f"model: {source} can't be converted into {cache}: {error}", "model") from None


def cache_folder() -> Path:
    """`$PDSERVE_CACHE/models`, or `pdserve/models` in `$XDG_CACHE_HOME` or `~/.cache`. `make clean` removes it."""
    own, shared = os.environ.get("PDSERVE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser() / "models"
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "pdserve" / "models"


def _find(cache: Path, key: str) -> Path | None:
    """The finished folder of `key`, under whatever name its content had when it was converted."""
    return next((path for path in cache.glob(f"*-{key}") if path.is_dir()), None)


def _name(kind: str, source: Path) -> str:
    """For people who look into the cache: a tokenizer's file is called the same in every model."""
    return source.stem if kind == "gguf" else f"{source.parent.name}-tokenizer"


def _content_key(kind: str, source: Path, cache: Path) -> str:
    """A hash of all that the conversion reads, and of how it converts."""
    digest = hashlib.sha256(f"{_CONVERSION_VERSION} {kind}".encode())
    if kind == "gguf":
        digest.update(_hash_once(source, cache).encode())
    else:
        for file in sorted(source.parent.iterdir()):
            if file.suffix in _TOKENIZER_SUFFIXES and file.is_file():
                digest.update(f" {file.name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _hash_once(file: Path, cache: Path) -> str:
    """The SHA-256 of `file`. It takes a second for each 500 MB, so the cache remembers it until the file changes."""
    facts = file.stat()
    seen = [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    memory = cache / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}.hash"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        remembered = json.loads(memory.read_text())
        if remembered["seen"] == seen:
            return str(remembered["sha256"])
    value = _hash(file, facts.st_size)
    if time.time() - max(facts.st_mtime, facts.st_ctime) > _SETTLED_S:
        partial = memory.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            partial.write_text(json.dumps({"file": str(file.resolve()), "seen": seen, "sha256": value}))
            partial.rename(memory)
    return value


def _hash(file: Path, num_bytes: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream, Progress(log, f"reading {file.name}", num_bytes / _GIB, "GiB") as progress:
        while piece := stream.read(_READ_BYTES):
            digest.update(piece)
            progress.advance(len(piece) / _GIB)
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(file: Path, source: Path, cancelled: Cancelled) -> Iterator[None]:
    """Hold `file`'s lock, which the system drops if the process dies. Raises ConfigError after the deadline."""
    deadline = time.monotonic() + _CONVERSION_TIMEOUT_S
    with file.open("w") as stream:
        with Progress(log, f"waiting for another process that converts {source.name}", 1, "conversion") as progress:
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(f"model: another process holds {file} and does not finish", "model") from None
                    _check(cancelled, source)
                    progress.beat()
                    time.sleep(_POLL_S)
        yield


def _convert(kind: str, source: Path, target: Path, cancelled: Cancelled) -> Path:
    """Convert into a folder beside `target`, then rename it; the caller holds the lock."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a conversion that died has left
    log.info("converting %s into %s; it is kept there", source, target)
    started_s = time.monotonic()
    alone = target.with_name(f"{target.name}.input")
    with tempfile.TemporaryFile("w+", errors="replace") as errors, _input(kind, source, alone) as file:
        with Progress(log, f"converting {source.name}", _NUM_STEPS[kind], "steps") as progress:
            status = _run(_command(kind, file, partial), source, errors, cancelled, progress)
        errors.seek(0)
        if status != 0:
            reason = (errors.read().strip().splitlines() or [f"exit status {status}"])[-1]
            raise ConfigError(f"model: {source} can't be converted: {reason}", "model")
    partial.rename(target)
    log.info("converted in %.0f s", time.monotonic() - started_s)
    return target


@contextlib.contextmanager
def _input(kind: str, source: Path, folder: Path) -> Iterator[Path]:
    """What the converter is given: of a GGUF file, a link in `folder`, made for it, for transformers would mix in what
    it finds beside the file, which belongs to some other model."""
    if kind != "gguf":
        yield source
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    link = folder / source.name
    link.symlink_to(source.resolve())
    try:
        yield link
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _command(kind: str, source: Path, target: Path) -> list[str]:
    return [sys.executable, "-m", "pdserve.model_conversion", kind, str(source), str(target)]


def _run(command: list[str], source: Path, errors: IO[str], cancelled: Cancelled, progress: Progress) -> int:
    """Run the converter, which says on its standard output what it begins with; returns its exit status."""
    deadline = time.monotonic() + _CONVERSION_TIMEOUT_S
    process = subprocess.Popen(
        command,
        # It must not try the network, nor get a Ctrl-C that is meant for whoever waits for it.
        env=child_environment(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES=""),
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    assert process.stdout is not None
    try:
        with process.stdout as steps:
            while process.poll() is None:
                if not (select.select([steps], [], [], _POLL_S)[0] and _take_step(steps.fileno(), progress)):
                    time.sleep(_POLL_S)
                _check(cancelled, source)
                if time.monotonic() > deadline:
                    raise ConfigError(f"model: converting {source} took over {_CONVERSION_TIMEOUT_S:.0f} s", "model")
                progress.beat()
    finally:
        process.kill()
        process.wait()
    return process.returncode


def _take_step(steps: int, progress: Progress) -> bool:
    """Say what the converter has begun with; False if it will say nothing more."""
    said = os.read(steps, 1 << 16).decode(errors="replace")
    for line in said.splitlines():
        # Libraries may have something to say, too.
        if line.startswith(STEP_PREFIX):
            progress.step(line.removeprefix(STEP_PREFIX))
    return bool(said)


def _check(cancelled: Cancelled, source: Path) -> None:
    if cancelled():
        raise Aborted(f"converting {source} was given up")

"""Which model a folder holds, as "1-" and 32 hex digits: the same on every host, another for other weights.

Made of the fields of `config.json` that shape the output, and of every tensor's name, type, shape and a few sampled
ranges of bytes, read by seek: neither its path, nor its files' names and times, nor how it is cut into files matter.
The part that reads the weights is kept beside them, or in the cache folder where theirs can't be written to, until a
file's name, size or time changes. Light to import: no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

from pdserve.conversion_cache import cache_folder
from pdserve.errors import ConfigError
from pdserve.model_fields import that_shape_the_output
from pdserve.model_store import read_config, weight_files

_MAKE = 1
"""Raised when the same model would get another fingerprint; see `pdserve.protocol.is_another_model`."""
_RANGE_BYTES = 64
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# A file that was changed a moment ago may change again without its times telling.
_SETTLED_S = 2.0
_KEPT_NAME = ".pdserve-fingerprint.json"


def model_fingerprint(folder: Path, load_format: str = "AUTO") -> str | None:
    """The fingerprint of a model folder, None if it holds no weights.

    Args:
        load_format: "DUMMY" for weights that are made up from the configuration.

    Raises:
        ConfigError: a file can't be read.
    """
    told = json.dumps(that_shape_the_output(read_config(folder)), sort_keys=True)
    if load_format == "DUMMY":
        return f"{_MAKE}-{_digest('dummy', told)}"
    try:
        files = weight_files(folder)
    except ConfigError:  # where somebody fetched the small files only, the index among them
        return None
    if not files:
        return None
    try:
        return f"{_MAKE}-{_digest(_weights(folder, files), told)}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder}: the weights can't be read: {error}", "model") from None


def _weights(folder: Path, files: list[Path]) -> str:
    """The digest of all tensors, kept or made now."""
    facts = [(file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for file in files for stat in (file.stat(),)]
    key = _digest(_MAKE, facts)
    places = (folder / _KEPT_NAME, cache_folder() / f"{_digest(str(folder.resolve()))}.fingerprint")
    for place in places:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            kept = json.loads(place.read_text(encoding="utf-8"))
            if kept["key"] == key and isinstance(kept["weights"], str):
                return str(kept["weights"])
    sampled: dict[str, list[Any]] = {}
    for file in files:
        sampled |= _sample(file)
    weights = _digest(sorted(sampled.items()))
    if time.time() - max(changed_ns for *_, changed_ns in facts) / 1e9 > _SETTLED_S:
        any(_keep(place, {"key": key, "weights": weights}) for place in places)
    return weights


def _sample(file: Path) -> dict[str, list[Any]]:
    """Type, shape and samples of every tensor of a safetensors file (its README, "Format")."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        found = {}
        for name, facts in header.items():
            first, end = facts["data_offsets"]
            samples = [_read(stream, 8 + header_bytes + at, end - at) for at in _offsets(name, first, end)]
            found[name] = [facts["dtype"], facts["shape"], samples]
        return found


def _offsets(name: str, first: int, end: int) -> list[int]:
    """Where to sample a tensor: its start, middle and end, and a place of its name's own."""
    room = max(0, end - first - _RANGE_BYTES)
    own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") % (room + 1)
    return [first, first + room // 2, first + room, first + own]


def _read(stream: BinaryIO, at: int, left: int) -> str:
    stream.seek(at)
    wanted = min(_RANGE_BYTES, left)
    read = stream.read(wanted)
    if len(read) != wanted:
        raise ValueError("a file is shorter than its header says")
    return read.hex()


def _keep(place: Path, kept: dict[str, str]) -> bool:
    """Write a file whole or not at all; False where that is not possible."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                json.dump(kept, stream)
            Path(name).chmod(0o644)  # for other users of the same folder
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError:
        return False
    return True


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

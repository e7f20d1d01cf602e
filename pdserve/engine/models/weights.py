"""Fills a rank's declared weights: from safetensors, or with random numbers.

Tensors go straight from the mapped file into their part of the fused matrices; of a tensor that is cut, only the
rank's part is read. No second copy of the model exists at any time. Files are closed again when `load` returns.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.weight import Share
from pdserve.errors import ConfigError, path_error
from pdserve.model_store import weight_files
from pdserve.progress import Progress

log = logging.getLogger(__name__)

_GIB = float(1 << 30)
_DUMMY_STD = 0.02  # what most families initialise with: logits neither vanish nor overflow


def load(folder: Path, build: Builder) -> None:
    """Copy the rank's part of the checkpoint in `folder` into what was built, converting to its type.

    Raises:
        ConfigError: there are no safetensors, a file is damaged, or a tensor is missing, unexpected or of another
            shape; the message names it.
    """
    missing = set(build.shares)
    with _progress("loading weights", build) as progress:
        for file in _shards(folder):
            missing -= _load_file(file, build, progress)
    if missing:
        raise ConfigError(f"{folder}: the checkpoint lacks {_some(missing)}", "model")


def fill_randomly(build: Builder) -> None:
    """Reproducible noise of a trained model's scale in every matrix; ones in the norms, zeros in the biases.

    Each tensor has a seed of its own, so that a rank draws only those it has a part of, and all ranks together hold
    what one would hold alone.
    """
    with _progress("drawing random weights", build) as progress:
        for share in build.shares.values():
            if share.tensor is None:
                continue
            if share.weight.fill == "noise":
                _draw(share, share.tensor)
            else:
                share.tensor.fill_(float(share.weight.fill == "ones"))
            progress.advance(share.tensor.nbytes / _GIB)


def _progress(what: str, build: Builder) -> Progress:
    """Of the rank's bytes. The ranks of a model load at the same time, and the first speaks for all."""
    return Progress(log, what, build.num_bytes / _GIB, "GiB", quiet=build.mapping.rank != 0)


def _draw(share: Share, tensor: torch.Tensor) -> None:
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(share.weight.name.encode()))
    if share.is_whole:
        tensor.normal_(0.0, _DUMMY_STD, generator=generator)
    else:
        stored = torch.empty(share.weight.shape, dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(share.take(stored.normal_(0.0, _DUMMY_STD, generator=generator)))


def _shards(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if files:
        return files
    if any(folder.glob("*.bin")):
        raise ConfigError(f"{folder} holds PyTorch .bin weights; allowed: safetensors", "model")
    raise ConfigError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json", "model")


def _load_file(file: Path, build: Builder, progress: Progress) -> set[str]:
    """Copy every tensor of `file` to where it belongs; returns the names of their weights."""
    ignored = tuple(build.ignored)
    try:
        with safe_open(file, framework="pt", device=str(build.device)) as opened:
            stored: list[str] = opened.keys()
            names = {build.full_name(name): name for name in stored if not name.endswith(ignored)}
            unexpected = names.keys() - build.shares.keys()
            if unexpected:
                raise ConfigError(f"{file}: unexpected tensors: {_some(unexpected)}", "model")
            for full_name, name in names.items():
                share = build.shares[full_name]
                if share.tensor is not None:
                    _copy(name, opened, share, share.tensor, file)
                    progress.advance(share.tensor.nbytes / _GIB)
    except (SafetensorError, OSError) as error:
        raise path_error(error, f"{file} can't be read: {error}", "model") from None
    return set(names)


def _copy(name: str, opened: Any, share: Share, tensor: torch.Tensor, file: Path) -> None:
    stored = opened.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape != share.weight.shape:
        raise ConfigError(f"{file}: {name} is {list(shape)}, config.json says {list(share.weight.shape)}", "model")
    part = opened.get_tensor(name) if share.is_whole else share.take(stored)
    if not part.is_floating_point():
        raise ConfigError(f"{file}: {name} is {part.dtype}; allowed: floating point", "model")
    tensor.copy_(part)


def _some(names: set[str]) -> str:
    """The first few of `names`."""
    listed = ", ".join(sorted(names)[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"

"""Fills a rank's parameters: from safetensors, or with random numbers.

Tensors go straight from the mapped file into their part of the fused parameters; of a tensor that is cut, only the
rank's part is read. No second copy of the model exists at any time. Files are closed again when `load` returns.
"""

from __future__ import annotations

import logging
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.mapping import Shard
from pdserve.engine.models.parameters import Parameters, Slot, checkpoint_slots
from pdserve.errors import ConfigError, path_error
from pdserve.model_store import weight_files
from pdserve.progress import Progress

log = logging.getLogger(__name__)

_GIB = float(1 << 30)
_DUMMY_STD = 0.02  # what most families initialise with: logits neither vanish nor overflow


def load(folder: Path, shard: Shard, parameters: Parameters) -> None:
    """Copy `shard`'s part of the checkpoint in `folder` into `parameters`, converting to their type.

    Raises:
        ConfigError: there are no safetensors, a file is damaged, or a tensor is missing, unexpected or of another
            shape; the message names it.
    """
    slots = checkpoint_slots(shard, parameters)
    missing = set(slots)
    with _progress("loading weights", shard, slots) as progress:
        for file in _shards(folder):
            missing -= _load_file(file, slots, parameters.layers[0].input_norm.device, shard.whole, progress)
    if missing:
        raise ConfigError(f"{folder}: the checkpoint lacks {_some(missing)}", "model")


def fill_randomly(shard: Shard, parameters: Parameters) -> None:
    """Reproducible noise of a trained model's scale in every matrix; ones in the norms, zeros in the biases.

    Each tensor has a seed of its own, so that a rank draws only those it has a part of, and all ranks together hold
    what one would hold alone.
    """
    slots = checkpoint_slots(shard, parameters)
    with _progress("drawing random weights", shard, slots) as progress:
        for name, slot in slots.items():
            if slot.tensor is None:
                continue
            if name.endswith("norm.weight"):
                slot.tensor.fill_(1.0)
            elif name.endswith("bias"):
                slot.tensor.zero_()
            else:
                _draw(slot, zlib.crc32(name.encode()))
            progress.advance(slot.tensor.nbytes / _GIB)


def _progress(what: str, shard: Shard, slots: dict[str, Slot]) -> Progress:
    """Of the rank's bytes. The ranks of a model load at the same time, and the first speaks for all."""
    num_bytes = sum(slot.tensor.nbytes for slot in slots.values() if slot.tensor is not None)
    return Progress(log, what, num_bytes / _GIB, "GiB", quiet=shard.mapping.rank != 0)


def _draw(slot: Slot, seed: int) -> None:
    tensor = slot.tensor
    assert tensor is not None
    generator = torch.Generator(tensor.device).manual_seed(seed)
    if slot.takes_all:
        tensor.normal_(0.0, _DUMMY_STD, generator=generator)
    else:
        whole = torch.empty(slot.shape, dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(whole.normal_(0.0, _DUMMY_STD, generator=generator)[slot.index])


def _shards(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if files:
        return files
    if any(folder.glob("*.bin")):
        raise ConfigError(f"{folder} holds PyTorch .bin weights; allowed: safetensors", "model")
    raise ConfigError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json", "model")


def _load_file(
    file: Path, slots: dict[str, Slot], device: torch.device, config: ModelConfig, progress: Progress
) -> set[str]:
    """Copy every tensor of `file` to its slot; returns their names."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            stored: list[str] = opened.keys()
            names = {name for name in stored if not _derived(name, config)}
            unexpected = names - slots.keys()
            if unexpected:
                raise ConfigError(f"{file}: unexpected tensors: {_some(unexpected)}", "model")
            for name in names:
                if (tensor := slots[name].tensor) is not None:
                    _copy(name, opened, slots[name], file)
                    progress.advance(tensor.nbytes / _GIB)
    except (SafetensorError, OSError) as error:
        raise path_error(error, f"{file} can't be read: {error}", "model") from None
    return names


def _copy(name: str, opened: Any, slot: Slot, file: Path) -> None:
    stored = opened.get_slice(name)
    shape = tuple(stored.get_shape())
    if shape != slot.shape:
        raise ConfigError(f"{file}: {name} is {list(shape)}, config.json says {list(slot.shape)}", "model")
    tensor = opened.get_tensor(name) if slot.takes_all else stored[slot.index]
    if not tensor.is_floating_point():
        raise ConfigError(f"{file}: {name} is {tensor.dtype}; allowed: floating point", "model")
    assert slot.tensor is not None
    slot.tensor.copy_(tensor)


def _derived(name: str, config: ModelConfig) -> bool:
    """Whether a tensor only repeats what the engine computes or shares by itself."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _some(names: set[str]) -> str:
    """The first few of `names`."""
    listed = ", ".join(sorted(names)[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"

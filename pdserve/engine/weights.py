"""Fills the decoder's parameters: from safetensors, or with random numbers.

Tensors go straight from the mapped file into their part of the fused parameters; no second copy of the model exists
at any time. Files are closed again when `load` returns.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdserve.engine.model_config import ModelConfig
from pdserve.engine.models.parameters import Parameters, checkpoint_slots
from pdserve.errors import ConfigError

_DUMMY_STD = 0.02  # what most families initialise with: logits neither vanish nor overflow
_DUMMY_SEED = 0


def load(folder: Path, config: ModelConfig, parameters: Parameters) -> None:
    """Copy the checkpoint in `folder` into `parameters`, converting to their type.

    Raises:
        ConfigError: there are no safetensors, a file is damaged, or a tensor is missing, unexpected or of another
            shape; the message names it.
    """
    slots = checkpoint_slots(config, parameters)
    missing = set(slots)
    for file in _shards(folder):
        missing -= _load_file(file, slots, parameters.embedding.device, config)
    if missing:
        raise ConfigError(f"{folder}: the checkpoint lacks {_some(missing)}", "model")


def fill_randomly(parameters: Parameters) -> None:
    """Reproducible noise of a trained model's scale in every matrix; ones in the norms, zeros in the biases."""
    device = parameters.embedding.device
    generator = torch.Generator(device).manual_seed(_DUMMY_SEED)
    tensors = {id(tensor): tensor for tensor in (parameters.embedding, parameters.lm_head)}
    for tensor in tensors.values():
        tensor.normal_(0.0, _DUMMY_STD, generator=generator)
    parameters.final_norm.fill_(1.0)
    for layer in parameters.layers:
        for name in layer.__slots__:
            tensor = getattr(layer, name)
            if tensor is None:
                continue
            if name.endswith("norm"):
                tensor.fill_(1.0)
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.normal_(0.0, _DUMMY_STD, generator=generator)


def _shards(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {error!r}", "model") from None
        for name in names:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder}: the shard {name}, named in {index.name}, is missing", "model")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    if any(folder.glob("*.bin")):
        raise ConfigError(f"{folder} holds PyTorch .bin weights; allowed: safetensors", "model")
    raise ConfigError(f"{folder} holds neither {single.name} nor {index.name}", "model")


def _load_file(file: Path, slots: dict[str, Tensor], device: torch.device, config: ModelConfig) -> set[str]:
    """Copy every tensor of `file` to its slot; returns their names."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            stored: list[str] = shard.keys()
            names = {name for name in stored if not _derived(name, config)}
            unexpected = names - slots.keys()
            if unexpected:
                raise ConfigError(f"{file}: unexpected tensors: {_some(unexpected)}", "model")
            for name in names:
                _copy(name, shard.get_tensor(name), slots[name], file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file} can't be read: {error}", "model") from None
    return names


def _copy(name: str, tensor: Tensor, slot: Tensor, file: Path) -> None:
    if tensor.shape != slot.shape:
        raise ConfigError(f"{file}: {name} is {list(tensor.shape)}, config.json says {list(slot.shape)}", "model")
    if not tensor.is_floating_point():
        raise ConfigError(f"{file}: {name} is {tensor.dtype}; allowed: floating point", "model")
    slot.copy_(tensor)


def _derived(name: str, config: ModelConfig) -> bool:
    """Whether a tensor only repeats what the engine computes or shares by itself."""
    return name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)


def _some(names: set[str]) -> str:
    """The first few of `names`."""
    listed = ", ".join(sorted(names)[:4])
    return listed if len(names) <= 4 else f"{listed} and {len(names) - 4} more"

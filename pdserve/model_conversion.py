"""Converts a model or a tokenizer into Hugging Face's current files; the program that `model_store` runs.

    python -m pdserve.model_conversion gguf SOURCE.gguf TARGET
    python -m pdserve.model_conversion tokenizer FOLDER/tokenizer.model TARGET

A process of its own: reading a GGUF tokenizer takes much memory and half a minute, and whoever asks for a model may
be a program that must not load torch. It says on standard output what it begins with, a line a step.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map, load_gguf_checkpoint

from pdserve.conversion_cache import STEP_PREFIX
from pdserve.gguf_metadata import GgufMetadata
from pdserve.process import die_with_parent

_BFLOAT16 = {"dtype": "bfloat16"}
"""The numbers are stored in float32 to be exact, but no quantised model needs more than bfloat16 to run."""


def convert_gguf(source: Path, target: Path) -> None:
    """Write `source` as config.json, float32 safetensors (exactly what the quantised numbers say) and tokenizer.

    Raises:
        ValueError: the file holds something that would be lost.
    """
    _say("reading the file")
    metadata = GgufMetadata(GGUFReader(source))
    names = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    config = AutoConfig.from_pretrained(**names)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    # First what may be refused: the rest takes a minute.
    metadata.check_tensors(get_gguf_hf_weights_map(shapes, TensorProcessor()))
    changes = metadata.config_changes(config.to_dict())
    _say("reading the tokenizer")
    AutoTokenizer.from_pretrained(**names).save_pretrained(target)
    _say("reading the weights")
    # Not `from_pretrained`: loading a GGUF file that way needs the accelerate package.
    tensors = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=shapes)["tensors"]
    missing = {name for name, _ in shapes.named_parameters()} - tensors.keys()
    if missing:
        raise ValueError(f"the file lacks {', '.join(sorted(missing)[:4])}")
    _say("writing the weights")
    save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
    config.architectures = [type(shapes).__name__]
    config.save_pretrained(target)
    _edit(target / "config.json", {**_BFLOAT16, **changes})
    GenerationConfig.from_model_config(config).save_pretrained(target)
    if stop := metadata.stop_token_ids():
        _edit(target / "generation_config.json", {"eos_token_id": stop})


def convert_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer of `source`'s folder with a tokenizer.json.

    Raises:
        ValueError: it has no such form, or a package that reads it is missing.
    """
    if source.suffix == ".model" and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError("a tokenizer.model is read with sentencepiece: pip install sentencepiece protobuf")
    _say("reading the tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), use_fast=True)
    _say("writing the tokenizer")
    tokenizer.save_pretrained(target)
    if not (target / "tokenizer.json").is_file():
        raise ValueError(f"{source.parent}: this kind of tokenizer has no tokenizer.json form")


def _say(step: str) -> None:
    sys.stdout.write(f"{STEP_PREFIX}{step}\n")
    sys.stdout.flush()


def _edit(file: Path, changes: dict[str, Any]) -> None:
    data = json.loads(file.read_text(encoding="utf-8"))
    data.update(changes)
    data.pop("torch_dtype", None)
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _sync(target: Path) -> None:
    """Force the files to disk: once the folder is renamed, nobody looks again whether they are whole."""
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def main() -> None:
    die_with_parent()
    kind, source, target = sys.argv[1:]
    convert = {"gguf": convert_gguf, "tokenizer": convert_tokenizer}[kind]
    try:
        convert(Path(source), Path(target))
        _sync(Path(target))
    except (ValueError, OSError, ImportError, KeyError) as error:
        # One line, which `model_store` passes on.
        raise SystemExit(" ".join(f"{type(error).__name__}: {error}".split())) from None


if __name__ == "__main__":
    main()

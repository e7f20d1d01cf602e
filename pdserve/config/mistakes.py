"""What a wrong key or value is answered with: one short line a fault, with the key's path and what would be right.

A suggestion is made only where it can hardly be wrong: a spelling close by, the name that another server has for the
same thing, or the one place where a key of that name is.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pdserve.config.masking import mask
from pdserve.config.schema import all_keys, annotation_at, section_of
from pdserve.errors import ConfigError

_LINE_CHARACTERS = 200
_VALUE_CHARACTERS = 60
_CLOSE = 0.8
POOLS = ("context_servers", "generation_servers")

# What other servers call it, and what it is called here, below the same section or at the top.
_NAMES_ELSEWHERE: dict[str, tuple[str, ...]] = {
    "block_size": ("kv_cache_config", "tokens_per_block"),
    "context_length": ("max_seq_len",),
    "enable_prefix_caching": ("kv_cache_config", "enable_block_reuse"),
    "enforce_eager": ("cuda_graph_config",),
    "gpu_memory_utilization": ("kv_cache_config", "free_gpu_memory_fraction"),
    "host": ("hostname",),
    "kv_cache_dtype": ("kv_cache_config", "dtype"),
    "kv_cache_free_gpu_memory_fraction": ("kv_cache_config", "free_gpu_memory_fraction"),
    "max_model_len": ("max_seq_len",),
    "max_num_batched_tokens": ("max_num_tokens",),
    "max_num_seqs": ("max_batch_size",),
    "mem_fraction_static": ("kv_cache_config", "free_gpu_memory_fraction"),
    "model_path": ("model",),
    "page_size": ("kv_cache_config", "tokens_per_block"),
    "pp_size": ("pipeline_parallel_size",),
    "swap_space": ("kv_cache_config", "host_cache_size"),
    "tokenizer_path": ("tokenizer",),
    "tp_size": ("tensor_parallel_size",),
}
# Names that mean different things in different places: pointing to one would mislead.
_AMBIGUOUS = frozenset({"backend", "dtype", "max_tokens"})


def explain(error: ValidationError, root: type[BaseModel]) -> ConfigError:
    """`error`, of validating a `root`, with a line for each fault."""
    details = _without_inherited(error.errors(include_url=False))
    return ConfigError("\n".join(_line(detail, root) for detail in details), _path(details[0]))


def unknown_key(location: Sequence[str], root: type[BaseModel]) -> str:
    """What to say of a key that is not there."""
    path = ".".join(location)
    right = suggestion(location, root)
    if right is not None:
        shown = right[-1] if right[:-1] == tuple(location[:-1]) else ".".join(right)
        return _cut(f"{path}: unknown key; did you mean {shown}?")
    section = section_of(annotation_at(root, location[:-1]))
    line = f"{path}: unknown key; allowed: {', '.join(section.model_fields) if section else 'none below it'}"
    return line if len(line) <= _LINE_CHARACTERS else _cut(f"{path}: unknown key; `pdserve config --help` lists all")


def suggestion(location: Sequence[str], root: type[BaseModel]) -> tuple[str, ...] | None:
    """The path that was meant by an unknown one, if that is clear."""
    above, name = tuple(location[:-1]), location[-1].replace("-", "_").lower()
    section = section_of(annotation_at(root, above))
    if section is None:
        return None
    if name in section.model_fields:
        return *above, name
    if name in _NAMES_ELSEWHERE:
        places = [(*above, *_NAMES_ELSEWHERE[name]), _NAMES_ELSEWHERE[name]]
        return next((place for place in places if annotation_at(root, place) is not None), None)
    if name in _AMBIGUOUS:
        return None
    for other in section.model_fields:
        if sorted(other) == sorted(name):  # two letters changed places, which weighs much in a short word
            return *above, other
    near = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=_CLOSE)
    return (*above, near[0]) if near else _only_place(name, above, root)


def _only_place(name: str, above: tuple[str, ...], root: type[BaseModel]) -> tuple[str, ...] | None:
    pool = above[:1] if above[:1] in [(pool,) for pool in POOLS] else ()
    places = [key for key in all_keys(root) if key[-1] == name and (key[:1] == pool if pool else key[0] not in POOLS)]
    return places[0] if len(places) == 1 else None


def _without_inherited(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out a pool's error that is the top level's own, passed down."""
    top = {(detail["loc"], detail["type"]) for detail in details}
    return [
        detail
        for detail in details
        if detail["loc"][:1] not in [(pool,) for pool in POOLS] or (detail["loc"][1:], detail["type"]) not in top
    ]


def _path(detail: ErrorDetails) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _line(detail: ErrorDetails, root: type[BaseModel]) -> str:
    path = _path(detail)
    if detail["type"] == "extra_forbidden":
        return unknown_key([str(part) for part in detail["loc"]], root)
    if detail["type"] == "missing":
        return f"{path}: required"
    message = detail["msg"].removeprefix("Value error, ")
    told = "" if isinstance(detail["input"], dict | BaseModel) else f", got {_value(detail['input'])}"
    return _cut(f"{path}: {message}{told}" if path else f"{message}{told}")


def _value(value: object) -> str:
    text = repr(mask(value))
    return text if len(text) <= _VALUE_CHARACTERS else f"{text[:_VALUE_CHARACTERS]}…"


def _cut(line: str) -> str:
    return line if len(line) <= _LINE_CHARACTERS else f"{line[: _LINE_CHARACTERS - 1]}…"

"""What a layer keeps of the tokens before: the one description that pools, block tables, attention and transfer share.

Layers whose specs are equal form a cache group, in the order in which their first layers stand in the model. Each group
has a pool and a prefix index of its own, and each sequence a block table of its own in it; a block has the same number
of tokens in every group. Without torch, so that the scheduler may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One layer's cache, of the whole model.

    "full" keeps keys and values of every token, "window" those of the last `window` tokens (the one that attends
    included), "latent" one compressed vector a token, "state" one state a sequence.

    Args:
        num_heads: heads of keys and values.
        head_dim: numbers in a key, and in a value.
        window: tokens; None unless `kind` is "window".
    """

    kind: Literal["full", "window", "latent", "state"]
    num_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """The `layers` of the model, ascending, that share `spec`."""

    spec: CacheSpec
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CacheShare:
    """What one rank holds of a cache group: `layers` of the group's, counted from 0 within it, and `heads` of each."""

    group: CacheGroup
    layers: range
    heads: range


def cache_groups(specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
    """The groups of a model whose layer i has `specs[i]`."""
    layers: dict[CacheSpec, list[int]] = {}
    for index, spec in enumerate(specs):
        layers.setdefault(spec, []).append(index)
    return tuple(CacheGroup(spec, tuple(members)) for spec, members in layers.items())

"""What a layer keeps of the tokens before it. Pools, block tables, attention and transfer all read this description.

Layers whose specs are equal form a cache group. Groups are ordered by their first layers. Each group has its own pool
and prefix index, and a sequence has its own block table in each group. A block holds the same number of tokens in every
group. No torch here, so that the scheduler may read it.
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
    """What one rank holds of a cache group.

    Args:
        layers: which of the group's layers, counted from 0 within the group.
        heads: which heads of each of them.
    """

    group: CacheGroup
    layers: range
    heads: range


def cache_groups(specs: Sequence[CacheSpec]) -> tuple[CacheGroup, ...]:
    """The groups of a model whose layer i has `specs[i]`."""
    layers: dict[CacheSpec, list[int]] = {}
    for index, spec in enumerate(specs):
        layers.setdefault(spec, []).append(index)
    return tuple(CacheGroup(spec, tuple(members)) for spec, members in layers.items())

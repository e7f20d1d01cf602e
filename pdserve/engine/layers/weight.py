"""A weight as the layer that uses it declares it. Loading, dummy weights, cutting, counting and checking all read this.

Layers declare weights in their constructors, to a `Builder` (`layers.builder`). `models.weights` fills them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

Fill = Literal["noise", "ones", "zeros"]


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of a weight this rank holds: the ranges `parts` of dimension `dim`, one after the other.

    `pdserve.engine.parallel.mapping.Mapping` computes the ranges: of query heads, KV heads, columns or the vocabulary.
    """

    dim: int
    parts: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a Hugging Face checkpoint.

    Args:
        name: its name in the checkpoint.
        shape: its shape in the checkpoint, before it is cut.
        cut: this rank's part; None: all of it.
        convert: from this rank's part, as the checkpoint stores it, to the layout that the layer keeps. None: they are
            the same.
        fill: the values of dummy weights.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None = None
    convert: Callable[[Tensor], Tensor] | None = None
    fill: Fill = "noise"


@dataclass(frozen=True)
class Share:
    """What this rank holds of `weight`: a tensor in the layer's layout; None: nothing."""

    weight: Weight
    tensor: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether the rank holds all of the weight, as the checkpoint stores it."""
        return self.weight.convert is None and self.indices == [(slice(None),)]

    @cached_property
    def indices(self) -> list[tuple[slice, ...]]:
        """The indices of the rank's part in the checkpoint's tensor. Ranges that touch are one index."""
        cut = self.weight.cut
        if cut is None or cut.parts == (range(self.weight.shape[cut.dim]),):
            return [(slice(None),)]
        joined = [cut.parts[0]]
        for before, part in pairwise(cut.parts):
            if before.stop == part.start:
                joined[-1] = range(joined[-1].start, part.stop)
            else:
                joined.append(part)
        return [(*[slice(None)] * cut.dim, slice(part.start, part.stop)) for part in joined]

    def take(self, stored: Any) -> Tensor:
        """Cut and convert: the rank's part of `stored`, a tensor or an open slice of a file, in the layer's layout."""
        pieces = [stored[index] for index in self.indices]
        cut, convert = self.weight.cut, self.weight.convert
        part: Tensor = pieces[0] if cut is None or len(pieces) == 1 else torch.cat(pieces, cut.dim)
        return part if convert is None else convert(part)

"""A weight, as the layer that uses it declares it: what all read who fill, cut, count or check weights.

Layers make these declarations in their constructors (`layers.builder`); `models.weights` fills what they name.
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
    """How tensor parallelism divides a weight: a rank holds `parts` of dimension `dim`, one after the other.

    The ranges are `pdserve.engine.parallel.mapping.Mapping`'s: rows of query heads, KV heads, columns or vocabulary.
    """

    dim: int
    parts: tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a Hugging Face checkpoint.

    Args:
        name: the checkpoint's.
        shape: in the checkpoint, of the whole model.
        cut: None: every rank holds all of it.
        convert: from this rank's part, as the checkpoint stores it, to the layout that the layer keeps.
        fill: what stands there without a checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    cut: Cut | None = None
    convert: Callable[[Tensor], Tensor] | None = None
    fill: Fill = "noise"


@dataclass(frozen=True)
class Share:
    """What this rank holds of `weight`: `tensor`, in the layer's layout; None if it holds nothing of it."""

    weight: Weight
    tensor: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether the rank holds all of the weight, as the checkpoint stores it."""
        return self.weight.convert is None and self.indices == [(slice(None),)]

    @cached_property
    def indices(self) -> list[tuple[slice, ...]]:
        """Where the rank's part stands in the checkpoint's tensor, piece by piece."""
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
        """The rank's part of `stored`, a tensor or a slice of a file, in the layer's layout."""
        pieces = [stored[index] for index in self.indices]
        cut, convert = self.weight.cut, self.weight.convert
        part: Tensor = pieces[0] if cut is None or len(pieces) == 1 else torch.cat(pieces, cut.dim)
        return part if convert is None else convert(part)

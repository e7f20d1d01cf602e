"""What layers are built with: where their tensors live, which part of them is this rank's, and who is told of them.

Owns the declarations of a model while it is built and filled. Life: a family builds its layers, which declare their
weights and caches here and get tensors that are not filled; `models.weights` fills what `shares` names; `finish` has
every layer bring its weights into the form it computes with. Afterwards the layers alone own them.

Layers that belong to other stages are built as well, without memory, so that every rank knows the whole checkpoint.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pd_kernels.paged_attention import Backend
from pdserve.engine.cache_spec import CacheSpec
from pdserve.engine.layers.weight import Share, Weight
from pdserve.engine.parallel.group import SINGLE_RANK, Group
from pdserve.progress import Progress

if TYPE_CHECKING:
    from pdserve.engine.layers.attention import AttentionKind

log = logging.getLogger(__name__)


class Builder:
    """For the rank that `group` speaks for.

    Attributes:
        dtype, device: of the weights; "meta" where what is built belongs to another stage.
        attention: which implementation of attention to run.
        shares: the declared weights by their names.
        ignored: ends of the names of tensors that a checkpoint may hold and that say nothing new.
        optional_prefix: what the names in a checkpoint of the family may lack at their start.
        caches: each layer's.
        kinds: the kinds of attention.
    """

    def __init__(
        self, dtype: torch.dtype, device: torch.device, group: Group = SINGLE_RANK, attention: Backend = "torch"
    ) -> None:
        self.group, self.mapping = group, group.mapping
        self.dtype, self.device, self.attention = dtype, device, attention
        self.shares: dict[str, Share] = {}
        self.ignored: list[str] = []
        self.optional_prefix = ""
        self.caches: list[CacheSpec] = []
        self.kinds: list[AttentionKind] = []
        self._num_caches: Counter[CacheSpec] = Counter()
        self._layers: list[Builder] = []
        self._on_finish: list[Callable[[], None]] = []

    @property
    def is_here(self) -> bool:
        """Whether what is built belongs to this rank's stage."""
        return self.device.type != "meta"

    @property
    def first_stage(self) -> Builder:
        """For what stands before the layers."""
        return self if self.mapping.is_first_stage else self._elsewhere()

    @property
    def last_stage(self) -> Builder:
        """For what stands after the layers."""
        return self if self.mapping.is_last_stage else self._elsewhere()

    def layers(self, num_layers: int) -> Iterator[Builder]:
        """One for each of the model's layers, in order."""
        here = self.mapping.layers(num_layers)
        for index in range(num_layers):
            each = copy.copy(self) if index in here else self._elsewhere()
            each._on_finish = []
            if index in here:
                self._layers.append(each)
            yield each

    def tensor(self, weight: Weight) -> Tensor:
        """Declare a weight that every rank holds whole; its tensor."""
        tensor = self.empty(*weight.shape)
        self.declare(weight, tensor)
        return tensor

    def empty(self, *shape: int) -> Tensor:
        """A tensor for declared weights, not filled."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def declare(self, weight: Weight, tensor: Tensor | None) -> None:
        """The layer keeps this rank's part of `weight` in `tensor`; None: the rank holds nothing of it.

        A weight that two layers share is declared by both, and kept by one of them on any rank.
        """
        share = Share(weight, tensor if self.is_here else None)
        known = self.shares.get(weight.name)
        assert known is None or known.tensor is None or share.tensor is None, f"{weight.name} is kept twice"
        if known is None or known.tensor is None:
            self.shares[weight.name] = share

    def cache(self, spec: CacheSpec) -> int:
        """Declare the cache of the layer that is being built; its place in the rank's pool of the layer's group."""
        self.caches.append(spec)
        self._num_caches[spec] += self.is_here
        return self._num_caches[spec] - 1

    def on_finish(self, call: Callable[[], None]) -> None:
        """Call it when all weights are filled."""
        if self.is_here:
            self._on_finish.append(call)

    def full_name(self, name: str) -> str:
        """The declared name of what a checkpoint calls `name`."""
        prefixed = self.optional_prefix + name
        return prefixed if prefixed in self.shares else name

    @property
    def num_bytes(self) -> int:
        """Memory of the rank's weights, before they are finished."""
        return sum(share.tensor.nbytes for share in self.shares.values() if share.tensor is not None)

    def finish(self) -> None:
        """Have all layers take their weights over, one after the other: a matrix that is repacked exists twice for a
        moment only."""
        self.shares.clear()
        with Progress(log, "laying out weights", len(self._layers), "layers", self.mapping.rank != 0) as progress:
            for layer in self._layers:
                layer._run_finishers()
                progress.advance()
        self._run_finishers()
        self._layers.clear()

    def _run_finishers(self) -> None:
        while self._on_finish:
            self._on_finish.pop(0)()

    def _elsewhere(self) -> Builder:
        builder = copy.copy(self)
        builder.device = torch.device("meta")
        return builder

"""What a model's layers are built with: device, number type, this rank's part, and the list of what layers declare.

`RankModel` makes a `Builder` and passes it to the family, which passes it to its layers. Life: each layer declares its
weights and its cache here, and gets tensors that are not filled yet; `models.weights` fills the tensors in `shares`;
`finish` lets every layer bring its weights into the form that it computes with. Afterwards the layers alone own them.

Layers of other stages are built, too, on the device "meta", which takes no memory. So every rank knows all weights of
the checkpoint.
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
    """Builds for the rank that `group` speaks for.

    Attributes:
        dtype, device: of the weights; the device is "meta" for layers of another stage.
        attention: the attention backend.
        shares: the declared weights by name, each with this rank's tensor.
        ignored: a checkpoint may hold further tensors whose names end so. They are not needed.
        optional_prefix: the names in a checkpoint of the family may lack this start.
        caches: the cache spec of each layer, in order.
        kinds: the attention kinds of the model.
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
        """Whether the layers that are built with it belong to this rank's stage."""
        return self.device.type != "meta"

    @property
    def first_stage(self) -> Builder:
        """The builder for what comes before the layers, such as the embedding."""
        return self if self.mapping.is_first_stage else self._elsewhere()

    @property
    def last_stage(self) -> Builder:
        """The builder for what comes after the layers, such as the output matrix."""
        return self if self.mapping.is_last_stage else self._elsewhere()

    def layers(self, num_layers: int) -> Iterator[Builder]:
        """Yields a builder for each of the model's layers, in order."""
        here = self.mapping.layers(num_layers)
        for index in range(num_layers):
            each = copy.copy(self) if index in here else self._elsewhere()
            each._on_finish = []
            if index in here:
                self._layers.append(each)
            yield each

    def tensor(self, weight: Weight) -> Tensor:
        """Declare a weight that every rank holds whole. Returns its tensor, not filled."""
        tensor = self.empty(*weight.shape)
        self.declare(weight, tensor)
        return tensor

    def empty(self, *shape: int) -> Tensor:
        """A new tensor for weights, not filled."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def declare(self, weight: Weight, tensor: Tensor | None) -> None:
        """Declare that a layer keeps this rank's part of `weight` in `tensor`; None: the rank holds nothing of it.

        Two layers that share a weight both declare it. On each rank, at most one of them keeps it.
        """
        share = Share(weight, tensor if self.is_here else None)
        known = self.shares.get(weight.name)
        assert known is None or known.tensor is None or share.tensor is None, f"{weight.name} is kept twice"
        if known is None or known.tensor is None:
            self.shares[weight.name] = share

    def cache(self, spec: CacheSpec) -> int:
        """Declare the cache of the layer that is being built. Returns the layer's number in this rank's pool of its
        cache group."""
        self.caches.append(spec)
        self._num_caches[spec] += self.is_here
        return self._num_caches[spec] - 1

    def on_finish(self, call: Callable[[], None]) -> None:
        """Have `call` called when all weights are filled, if the layer belongs to this rank's stage."""
        if self.is_here:
            self._on_finish.append(call)

    def full_name(self, name: str) -> str:
        """The declared name of what a checkpoint calls `name`."""
        prefixed = self.optional_prefix + name
        return prefixed if prefixed in self.shares else name

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's weights as declared; `finish` may lay them out anew."""
        return sum(share.tensor.nbytes for share in self.shares.values() if share.tensor is not None)

    def finish(self) -> None:
        """Let the layers take their weights over, one layer after the other, so that only one layer's matrices exist
        twice while they are repacked."""
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

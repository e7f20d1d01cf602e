"""One forward pass over a step as the layers see it: where keys and values are written, and what queries attend to.

The decoder makes a `StepContext` for each pass, and each layer calls `attend` once, in order. Owns what a step prepares
once for all layers of an attention kind: the rotary angles and the attention plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pd_kernels import paged_attention
from pd_kernels.paged_attention import PagedBatch
from pd_kernels.rope_cache import rope_and_cache, write_cache
from pdserve.engine.cache_spec import CacheSpec
from pdserve.engine.layers.step_input import GroupInput, StepInput

if TYPE_CHECKING:
    from pdserve.engine.layers.attention import Attention, AttentionKind


class _Prepared:
    """What this step has prepared for one attention kind."""

    __slots__ = ("angles", "group", "plan")

    def __init__(self, group: GroupInput, angles: tuple[Tensor, Tensor] | None, plan: paged_attention.Plan) -> None:
        self.group, self.angles, self.plan = group, angles, plan


class StepContext:
    """See the module.

    Attributes:
        rows: the numbers of the rows that the layer which has just attended goes on with; None: all rows.

    Args:
        groups: for each cache spec, its place in `step.groups`.
        narrow_at: from layer number `narrow_at` on, counted from 1, only the rows of `step.outputs` are needed; 0: all
            rows are needed in every layer.
        on_layers: called after each layer has enqueued its keys and values, with the number of layers that have.
    """

    def __init__(
        self, step: StepInput, groups: Mapping[CacheSpec, int], backend: paged_attention.Backend, dtype: torch.dtype,
        narrow_at: int, on_layers: Callable[[int], None] | None,
    ) -> None:  # fmt: skip
        self._step, self._groups, self._backend, self._dtype = step, groups, backend, dtype
        self._narrow_at = narrow_at if step.outputs is not None else 0
        self._on_layers = on_layers
        self._num_layers = 0
        self.rows: Tensor | None = None
        self._prepared: dict[AttentionKind, _Prepared] = {}

    def attend(self, layer: Attention, qkv: Tensor) -> Tensor | None:
        """Write a layer's keys and values to its cache, and attend.

        Args:
            qkv: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; its queries and keys are rotated in place.

        Returns:
            [num_rows, num_heads * head_dim] of the rows that are needed; None if there are none.
        """
        kind = layer.kind
        prepared = self._prepared.get(kind) or self._prepare(kind)
        group, plan = prepared.group, prepared.plan
        if prepared.angles is None:
            write_cache(qkv, group.slots, group.pool, layer.index, kind.num_heads)
        else:
            cos, sin = prepared.angles
            rope_and_cache(qkv, cos, sin, group.slots, group.pool, layer.index, kind.num_heads)
        self._num_layers += 1
        if self._on_layers is not None:
            self._on_layers(self._num_layers)
        if self._num_layers == self._narrow_at:
            outputs = self._step.outputs
            assert outputs is not None, "checked at construction"
            # The keys and values of all rows are written by now, and nothing reads the other rows' output.
            self.rows = outputs.rows
            if not len(self.rows):
                return None
            qkv = qkv.index_select(0, self.rows)
            plan = self._plan(kind, outputs.batches[self._groups[kind.cache]], group.pool)
        return plan.run(qkv, layer.index)

    def _prepare(self, kind: AttentionKind) -> _Prepared:
        group = self._step.groups[self._groups[kind.cache]]
        angles = None if kind.rotary is None else kind.rotary(self._step.positions)
        prepared = _Prepared(group, angles, self._plan(kind, group.batch, group.pool))
        self._prepared[kind] = prepared
        return prepared

    def _plan(self, kind: AttentionKind, batch: PagedBatch, pool: Tensor) -> paged_attention.Plan:
        return paged_attention.plan(batch, pool, kind.spec, self._backend, self._dtype)

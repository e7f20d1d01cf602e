"""The decoder that all families build: takes a step's tokens through the layers, over paged caches and several ranks.

A family makes it from layers; `StepExecutor` and the CUDA graphs call it. Owns the order of the layers and what stages
pass on to each other. The code is the same for every device: differences between devices are inside `pd_kernels` and
`layers.linear`, what ranks exchange is inside `parallel.group`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pd_kernels import paged_attention
from pdserve.engine.cache_spec import CacheShare, CacheSpec, cache_groups
from pdserve.engine.layers.block import Block
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.embedding import Embedding, Head
from pdserve.engine.layers.norm import LayerNorm, RMSNorm
from pdserve.engine.layers.step_context import StepContext
from pdserve.engine.layers.step_input import StepInput
from pdserve.engine.parallel.mapping import vocab_starts


class Decoder:
    """One rank's share of a model, with its weights. A step brings the KV pools with it.

    All ranks make the same calls in the same order, with the same steps.

    Args:
        build: the builder of the parts below. Parts of other stages are dropped.
        blocks: one for each layer of the model.
    """

    def __init__(
        self, build: Builder, embedding: Embedding, blocks: Sequence[Block], norm: RMSNorm | LayerNorm, head: Head
    ) -> None:
        self._group, mapping = build.group, build.mapping
        self._attention: paged_attention.Backend = build.attention
        self._dtype, self._device = build.dtype, build.device
        self._vocab_size, self._hidden_size = embedding.weight.shape
        self._vocab_starts, self._vocab_width = vocab_starts(self._vocab_size, mapping.tp_size)
        self._kinds = build.kinds
        self.caches: Sequence[CacheSpec] = build.caches
        self._layers = mapping.layers(len(blocks))
        self._cache_numbers = {group.spec: at for at, group in enumerate(cache_groups(self.caches))}
        self._embedding = embedding if mapping.is_first_stage else None
        self._blocks = [blocks[index] for index in self._layers]
        self._norm = norm if mapping.is_last_stage else None
        self._head = head if mapping.is_last_stage else None
        # Later stages need keys and values of all rows.
        self._narrow_at = len(self._blocks) if mapping.is_last_stage else 0

    @property
    def is_first_rank(self) -> bool:
        """Whether this is rank 0, which speaks for all."""
        return self._group.mapping.rank == 0

    def cache_shares(self) -> list[CacheShare]:
        """This rank's part of each cache group, in the order of the groups, which pools and block tables have, too."""
        heads = {kind.cache: kind.keys for kind in self._kinds}
        shares = []
        for group in cache_groups(self.caches):
            own = [at for at, layer in enumerate(group.layers) if layer in self._layers]
            layers = range(own[0], own[-1] + 1) if own else range(0)
            shares.append(CacheShare(group, layers, heads[group.spec]))
        return shares

    def step_bytes(self, max_num_tokens: int, max_batch_size: int, max_seq_len: int) -> int:
        """Upper bound of what `forward` and `logits` allocate at one time, without the caller's copies of logits.

        Counts the tensors alive at the widest point of a layer, and the rank's logits; doubled for the allocator's
        rounding and the kernels' small workspaces. What attention needs is counted exactly.
        """
        width = 4 * self._hidden_size + max(block.step_width for block in self._blocks)
        angles = sum(2 * 4 * kind.head_dim for kind in self._kinds if kind.rotary is not None)
        layer_bytes = max_num_tokens * (width * self._dtype.itemsize + angles)
        logits_bytes = max_batch_size * (0 if self._head is None else len(self._head.rows)) * self._dtype.itemsize
        attention_bytes = sum(
            paged_attention.workspace_bytes(
                kind.spec, self._attention, self._dtype, self._device,
                max_tokens=max_num_tokens, max_seqs=max_batch_size, max_seq_len=max_seq_len,
            )
            for kind in self._kinds
        )  # fmt: skip
        return 2 * (layer_bytes + logits_bytes) + attention_bytes

    def prepare(self, pools: Sequence[Tensor], max_tokens: int, max_seq_len: int) -> None:
        """Do ahead what a device does at the first prompt of each length, for steps of up to `max_tokens` tokens."""
        for kind in self._kinds:
            pool = pools[self._cache_numbers[kind.cache]]
            paged_attention.prepare(pool, kind.spec, max_tokens, self._attention, self._dtype, max_seq_len)

    def forward(self, step: StepInput, on_layers: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states after the final norm, [num_outputs, hidden_size]; writes the step's KV into its pools.

        On ranks of earlier stages: what the next one was sent, of all rows, and good for `logits` only.
        `on_layers` is told of how many layers the KV is launched, after each.
        """
        context = StepContext(step, self._cache_numbers, self._attention, self._dtype, self._narrow_at, on_layers)
        residual = self._enter(step)
        update: Tensor | None = None
        for block in self._blocks:
            update, residual = block(update, residual, context)
        if update is None:
            return residual
        if self._norm is None:
            self._group.send(residual.add_(update))
            return residual
        return self._norm.add(update, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] of rows of `forward`'s result, of their type; on ranks other than 0 of no rows."""
        blank = (len(hidden), self._vocab_width)
        parts = self._group.gather(hidden.new_empty(blank) if self._head is None else self._head(hidden))
        if len(parts) == 1:
            return parts[0]
        joined = hidden.new_empty((len(hidden) if parts else 0, self._vocab_size))
        for start, each in zip(self._vocab_starts, parts, strict=False):
            joined[:, start : start + self._vocab_width] = each
        return joined

    def _enter(self, step: StepInput) -> Tensor:
        """What the first of this rank's layers is given."""
        if self._embedding is not None:
            return self._embedding(step)
        shape = (len(step.token_ids), self._hidden_size)
        return self._group.receive(torch.empty(shape, dtype=self._dtype, device=self._device))

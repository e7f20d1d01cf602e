"""The decoder: Llama, Mistral, Qwen2, Qwen3 and their kin, over packed tokens and a paged KV cache.

Owns the parameters and the order of operations. One code path for every device and for any number of ranks; what
differs between devices is inside `pd_kernels` and `layers.linear`, what ranks exchange inside `parallel.group`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from pd_kernels import paged_attention
from pd_kernels.paged_attention import PagedBatch
from pd_kernels.rms_norm import add_rms_norm, rms_norm
from pd_kernels.rope_cache import rope_and_cache
from pd_kernels.silu_and_mul import silu_and_mul
from pdserve.engine.layers.linear import Linear
from pdserve.engine.layers.rope import RotaryEmbedding
from pdserve.engine.layers.step_input import StepInput
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.group import SINGLE_RANK, Group
from pdserve.engine.models.mapping import vocab_starts
from pdserve.engine.models.parameters import LayerParameters, Parameters
from pdserve.progress import Progress

log = logging.getLogger(__name__)


class DecoderLayer:
    """The matrices and norms of one layer; see `Decoder.forward` for how they follow each other."""

    def __init__(self, config: ModelConfig, parameters: LayerParameters) -> None:
        self._config = config
        self.input_norm = parameters.input_norm
        self.post_attention_norm = parameters.post_attention_norm
        self.o = Linear(parameters.o, parameters.o_bias)
        self._qkv = Linear(parameters.qkv, parameters.qkv_bias)
        self._q_norm, self._k_norm = parameters.q_norm, parameters.k_norm
        self._gate_up = Linear(parameters.gate_up, parameters.gate_up_bias)
        self._down = Linear(parameters.down, parameters.down_bias)

    def qkv(self, hidden: Tensor) -> Tensor:
        """Queries, keys and values side by side, with the family's norms over each head of the first two."""
        qkv = self._qkv(hidden)
        if self._q_norm is not None and self._k_norm is not None:
            heads = qkv.view(qkv.shape[0], -1, self._config.head_dim)
            first_key, first_value = self._config.num_heads, self._config.num_heads + self._config.num_kv_heads
            queries, keys = heads[:, :first_key], heads[:, first_key:first_value]
            rms_norm(queries, self._q_norm, self._config.rms_norm_eps, out=queries)
            rms_norm(keys, self._k_norm, self._config.rms_norm_eps, out=keys)
        return qkv

    def mlp(self, hidden: Tensor) -> Tensor:
        return self._down(silu_and_mul(self._gate_up(hidden)))


class Decoder:
    """One rank's share of a model, with its parameters; the KV pools are lent to each step.

    All ranks of `group` make the same calls in the same order, with the same steps.

    Args:
        config: of the rank's own share, see `parallel.mapping.Shard.config`.
        parameters: filled in. They are taken over: `parameters.layers` is empty afterwards, so that a matrix that is
            repacked exists twice for a moment only.
        attention: which implementation of attention to run.
    """

    def __init__(
        self,
        config: ModelConfig,
        parameters: Parameters,
        attention: paged_attention.Backend,
        group: Group = SINGLE_RANK,
    ) -> None:
        self._config = config
        self._group = group
        self._attention: paged_attention.Backend = attention
        self._embedding = parameters.embedding
        self._lm_head = None if parameters.lm_head is None else Linear(parameters.lm_head)
        self._vocab_starts, self._vocab_width = vocab_starts(config.vocab_size, group.mapping.tp_size)
        self._layers: list[DecoderLayer] = []
        with Progress(log, "laying out weights", len(parameters.layers), "layers", not self.is_first_rank) as progress:
            while parameters.layers:
                self._layers.append(DecoderLayer(config, parameters.layers.pop(0)))
                progress.advance()
        self._final_norm = parameters.final_norm
        self._next_norms = [*(layer.input_norm for layer in self._layers[1:]), parameters.final_norm]
        self._dtype = self._layers[0].input_norm.dtype
        self._rotary = RotaryEmbedding(config.rope, config.head_dim, self._layers[0].input_norm.device)

    @property
    def is_first_rank(self) -> bool:
        """Whether this is the rank that speaks for all of them."""
        return self._group.mapping.rank == 0

    def prepare(self, pool: Tensor, max_tokens: int, max_seq_len: int) -> None:
        """Do ahead what a device does at the first prompt of each length, for steps of up to `max_tokens` tokens."""
        paged_attention.prepare(pool, self._config.num_heads, max_tokens, self._attention, self._dtype, max_seq_len)

    def forward(self, step: StepInput, on_layers: Callable[[int], None] | None = None) -> Tensor:
        """Hidden states after the final norm, [num_outputs, hidden_size]; writes the step's KV into its pool.

        On ranks of earlier stages: what the next one was sent, of all rows, and good for `logits` only.
        `on_layers` is told of how many layers the KV is launched, after each.
        """
        eps, group = self._config.rms_norm_eps, self._group
        cos, sin = self._rotary(step.positions)
        residual = self._enter(step)
        (group_input,) = step.groups
        pool, slots = group_input.pool, group_input.slots
        attention = self._plan(group_input.batch, pool)
        hidden = rms_norm(residual, self._layers[0].input_norm, eps)
        for index, (layer, next_norm) in enumerate(zip(self._layers, self._next_norms, strict=True)):
            qkv = layer.qkv(hidden)
            rope_and_cache(qkv, cos, sin, slots, pool, index, self._config.num_heads)
            if on_layers is not None:
                on_layers(index + 1)
            if step.outputs is not None and self._final_norm is not None and next_norm is self._final_norm:
                # The last layer's keys and values are all there; nobody reads what else it makes of the other rows.
                rows = step.outputs.rows
                if not len(rows):
                    return residual[:0]
                qkv, residual = qkv.index_select(0, rows), residual.index_select(0, rows)
                attention = self._plan(step.outputs.batches[0], pool)
            attended = group.all_reduce(layer.o(attention.run(qkv, index)))
            hidden = add_rms_norm(attended, residual, layer.post_attention_norm, eps)
            update = group.all_reduce(layer.mlp(hidden))
            if next_norm is None:
                group.send(residual.add_(update))
                return residual
            hidden = add_rms_norm(update, residual, next_norm, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocab_size] of rows of `forward`'s result, of their type; on ranks other than 0 of no rows."""
        blank = (len(hidden), self._vocab_width)
        parts = self._group.gather(hidden.new_empty(blank) if self._lm_head is None else self._lm_head(hidden))
        if len(parts) == 1:
            return parts[0]
        joined = hidden.new_empty((len(hidden) if parts else 0, self._config.vocab_size))
        for start, each in zip(self._vocab_starts, parts, strict=False):
            joined[:, start : start + self._vocab_width] = each
        return joined

    def _plan(self, batch: PagedBatch, pool: Tensor) -> paged_attention.Plan:
        return paged_attention.plan(batch, pool, self._config.num_heads, self._attention, self._dtype)

    def _enter(self, step: StepInput) -> Tensor:
        """What the first of this rank's layers is given."""
        if self._embedding is not None:
            return functional.embedding(step.token_ids, self._embedding)
        like = self._layers[0].input_norm
        return self._group.receive(like.new_empty((len(step.token_ids), len(like))))

"""Attention over the paged cache: projections, norms, heads. `StepContext` knows where keys and values are cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pd_kernels.paged_attention import AttentionSpec, declines
from pdserve.engine.cache_spec import CacheSpec
from pdserve.engine.layers.builder import Builder
from pdserve.engine.layers.linear import FusedLinear, Outputs, SummedLinear
from pdserve.engine.layers.norm import RMSNorm
from pdserve.engine.layers.rope import RotaryEmbedding
from pdserve.engine.layers.step_context import StepContext
from pdserve.errors import ConfigError


class AttentionKind:
    """What the attention of some layers has in common. A family makes one for them; each step prepares it once.

    The scale is 1 / sqrt(head_dim). The ranks of a stage divide the heads among themselves.

    Attributes:
        queries, keys: this rank's query heads and KV heads.
        q_size: elements of a token's queries, on all ranks together.
        cache: the cache spec of these layers.
        spec: what this rank's layers ask of the attention backend.

    Args:
        num_heads, num_kv_heads, head_dim: of the whole model.
        window: how many tokens a token attends to, itself included; None: all before it.
        rotary: positions of queries and keys; None: they have none.

    Raises:
        ConfigError: the attention backend declines the spec.
    """

    def __init__(
        self, build: Builder, num_heads: int, num_kv_heads: int, head_dim: int, *,
        window: int | None = None, rotary: RotaryEmbedding | None = None,
    ) -> None:  # fmt: skip
        self.queries, self.keys = build.mapping.heads(num_heads, num_kv_heads)
        self.num_heads, self.num_kv_heads = len(self.queries), len(self.keys)
        self.head_dim = head_dim
        self.rotary = rotary
        self.cache = CacheSpec("full" if window is None else "window", num_kv_heads, head_dim, window)
        self.q_size, self._kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.spec = replace(AttentionSpec.plain(self.num_heads, self.num_kv_heads, head_dim), window=window)
        reason = declines(self.spec, build.attention, build.dtype, build.device)
        if reason is not None:
            raise ConfigError(
                f"attn_backend: {build.attention.upper()} can't serve this model: {reason}", "attn_backend"
            )
        build.kinds.append(self)

    @property
    def query_rows(self) -> range:
        """This rank's rows of the matrix that makes the queries."""
        return _rows(self.queries, self.head_dim)

    def separate(self, queries: str, keys: str, values: str) -> list[Outputs]:
        """The outputs of the projection where a checkpoint has three matrices of these names."""
        rows = _rows(self.keys, self.head_dim)
        return [
            Outputs(queries, self.q_size, (self.query_rows,)),
            Outputs(keys, self._kv_size, (rows,)),
            Outputs(values, self._kv_size, (rows,)),
        ]

    def fused(self, name: str) -> list[Outputs]:
        """The outputs of the projection where a checkpoint has one matrix, with the rows of queries, keys and values in
        this order."""
        first_key, first_value = self.q_size, self.q_size + self._kv_size
        key_rows, value_rows = (_rows(self.keys, self.head_dim, first) for first in (first_key, first_value))
        return [Outputs(name, first_value + self._kv_size, (self.query_rows, key_rows, value_rows))]


class Attention:
    """The attention of one layer.

    Args:
        qkv: what makes queries, keys and values: `kind.separate(...)` or `kind.fused(...)`.
        out: the name of the output matrix.
        bias, out_bias: whether the two projections have a bias.
        norms: the norm of each query head, and of each key head; None: there are none.
        transposed: whether the checkpoint stores matrices as [num_inputs, num_outputs].
    """

    def __init__(
        self, build: Builder, kind: AttentionKind, hidden_size: int, qkv: Sequence[Outputs], out: str, *,
        bias: bool = False, out_bias: bool = False, norms: tuple[RMSNorm, RMSNorm] | None = None,
        transposed: bool = False,
    ) -> None:  # fmt: skip
        self.kind = kind
        self.index = build.cache(kind.cache)
        self._qkv = FusedLinear(build, qkv, hidden_size, bias=bias, transposed=transposed)
        self._out = SummedLinear(
            build, out, hidden_size, kind.q_size, kind.query_rows, bias=out_bias, transposed=transposed
        )
        self._norms = norms
        self.step_width = kind.spec.qkv_width + kind.spec.out_width

    def __call__(self, hidden: Tensor, step: StepContext) -> Tensor | None:
        """The attention of `hidden` [num_tokens, hidden_size]: [num_rows, hidden_size], for all rows, or in the last
        layer for those whose output is wanted; None if none is."""
        qkv = self._qkv(hidden)
        if self._norms is not None:
            self._normalize(qkv, *self._norms)
        attended = step.attend(self, qkv)
        return None if attended is None else self._out(attended)

    def _normalize(self, qkv: Tensor, q_norm: RMSNorm, k_norm: RMSNorm) -> None:
        heads = qkv.view(qkv.shape[0], -1, self.kind.head_dim)
        first_key, first_value = self.kind.num_heads, self.kind.num_heads + self.kind.num_kv_heads
        queries, keys = heads[:, :first_key], heads[:, first_key:first_value]
        q_norm(queries, out=queries)
        k_norm(keys, out=keys)


def _rows(heads: range, head_dim: int, offset: int = 0) -> range:
    return range(offset + heads.start * head_dim, offset + heads.stop * head_dim)

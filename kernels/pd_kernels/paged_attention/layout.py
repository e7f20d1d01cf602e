"""How keys and partial results stand in tensors: what the parts of a prefill hand to each other."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from pd_kernels.paged_attention.spec import AttentionSpec

# Gathered sequences start at multiples of it, so that a tile past a sequence's end reads no other one.
GATHER_TOKENS = 64


class KvRows(NamedTuple):
    """Keys and values of tokens, one token a row of `rows`, [num_tokens, width], dense.

    Column `first_column` is where the first key head starts; all key heads follow it, then all value heads, each
    `pitch` columns after the one before.
    """

    rows: Tensor
    first_column: int
    pitch: int

    @classmethod
    def of_step(cls, qkv: Tensor, spec: AttentionSpec) -> KvRows:
        """The new tokens' own; only where heads need no room between them."""
        return cls(qkv, spec.num_heads * spec.qk_dim, spec.qk_dim)

    @classmethod
    def empty(cls, num_tokens: int, spec: AttentionSpec, like: Tensor) -> KvRows:
        """Rows to be filled."""
        pitch = spec.pitch(like.element_size())
        return cls(like.new_empty((num_tokens, 2 * spec.num_kv_heads * pitch)), 0, pitch)

    def tokens(self, start: int, stop: int) -> Tensor:
        """Keys and values of some tokens, [stop - start, 2 * num_kv_heads * pitch]."""
        return self.rows[start:stop, self.first_column :]


class Partial(NamedTuple):
    """Attention over some keys only: normalized `out` [n, num_heads, head_dim], dense, and `lse` [num_heads, n].

    `lse` is the natural logarithm of the sum of weights, float32.
    """

    out: Tensor
    lse: Tensor

    def tokens(self, start: int, stop: int) -> Partial:
        return Partial(self.out[start:stop], self.lse[:, start:stop])


def gathered_tokens(num_tokens: int) -> int:
    """Rows that a sequence of so many tokens takes once it is gathered: whole `GATHER_TOKENS`."""
    return -(-num_tokens // GATHER_TOKENS) * GATHER_TOKENS

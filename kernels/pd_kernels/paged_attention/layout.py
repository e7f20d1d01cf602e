"""How heads, keys and partial results stand in tensors: what the parts of a prefill hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Gathered sequences start at multiples of it, so that a tile past a sequence's end reads no other one.
GATHER_TOKENS = 64
_COPY_BYTES = 16  # the copy engine of a GPU takes rows and columns that start at multiples of it


@dataclass(frozen=True, slots=True)
class Heads:
    """A model's heads; a step's `qkv` has queries, keys and values of a token side by side in one row."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def out_width(self) -> int:
        return self.num_heads * self.head_dim

    def pitch(self, element_bytes: int) -> int:
        """Elements from one head to the next where keys are laid out for the copy engine: head_dim or a few more."""
        unit = _COPY_BYTES // element_bytes
        return -(-self.head_dim // unit) * unit


class KvRows(NamedTuple):
    """Keys and values of tokens, one token a row of `rows`, [num_tokens, width], dense.

    Column `first_column` is where the first key head starts; all key heads follow it, then all value heads, each
    `pitch` columns after the one before.
    """

    rows: Tensor
    first_column: int
    pitch: int

    @classmethod
    def of_step(cls, qkv: Tensor, heads: Heads) -> KvRows:
        """The new tokens' own; only where heads need no room between them."""
        return cls(qkv, heads.out_width, heads.head_dim)

    @classmethod
    def empty(cls, num_tokens: int, heads: Heads, like: Tensor) -> KvRows:
        """Rows to be filled."""
        pitch = heads.pitch(like.element_size())
        return cls(like.new_empty((num_tokens, 2 * heads.num_kv_heads * pitch)), 0, pitch)

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

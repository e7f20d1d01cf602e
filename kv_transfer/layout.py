"""What a KV pool looks like, so that two workers can tell before the first byte whether their pools can be joined.

Owns the description and its comparison, not the memory: the engine allocates the pool and keeps it alive.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import msgspec
from torch import Tensor

from pdserve.errors import LayoutMismatch


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One worker's view of the KV cache. `dtype` is torch's name without its prefix ("bfloat16").

    `model` identifies the weights, so that two models of one shape are told apart. `num_layers` and `num_kv_heads`
    are this rank's share.
    """

    model: str
    num_layers: int
    kv_factor: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: str
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    def hash(self) -> str:
        """16 hex digits; equal exactly when every field is."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]

    def compare(self, other: KvLayout) -> LayoutMismatch | None:
        """None when KV of `other` fits here as it is; otherwise the error that names the first field that differs."""
        for field in self.__struct_fields__:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return LayoutMismatch(f"the KV layouts differ in {field}: {ours!r} here, {theirs!r} there", field)
        return None


@dataclass(frozen=True)
class KvPoolView:
    """A pool of blocks: `tensor` is `[num_blocks, num_layers, kv_factor, num_kv_heads, tokens_per_block, head_dim]`.

    Raises:
        ValueError: the tensor is not contiguous, or not of `layout`'s shape and dtype.
    """

    tensor: Tensor
    layout: KvLayout

    def __post_init__(self) -> None:
        of = self.layout
        expected = (of.num_layers, of.kv_factor, of.num_kv_heads, of.tokens_per_block, of.head_dim)
        if tuple(self.tensor.shape[1:]) != expected:
            raise ValueError(f"a block of the pool is {tuple(self.tensor.shape[1:])}, its layout says {expected}")
        if str(self.tensor.dtype) != f"torch.{of.dtype}":
            raise ValueError(f"the pool holds {self.tensor.dtype}, its layout says {of.dtype}")
        if not self.tensor.is_contiguous():
            raise ValueError("the pool's tensor must be contiguous")

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[0]

    @cached_property
    def block_bytes(self) -> int:
        return self.tensor[0].numel() * self.tensor.element_size()

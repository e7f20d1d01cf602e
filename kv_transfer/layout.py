"""What a rank's share of the KV cache looks like, so that two workers can tell before the first byte if they fit.

Owns the description and its comparison, not the memory: the engine allocates the pool and keeps it alive. Which rank
sends what to which other is `routes`'.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import msgspec
from torch import Tensor

from pdserve.errors import LayoutMismatch
from pdserve.protocol import is_another_model

SAME = ("model", "num_layers", "kv_factor", "num_kv_heads", "head_dim")
"""What two workers must have in common. Tokens of a block, types of values and shares of ranks may differ."""

CONVERTIBLE = frozenset({"float32", "bfloat16", "float16", "float8_e4m3fn"})
"""Types of values that are converted on the way, saturating where the target's range is smaller."""


class Span(NamedTuple):
    """Indices `first` to `end`, without `end`."""

    first: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.first if self.end > self.first else 0

    def overlap(self, other: Span) -> Span:
        return Span(max(self.first, other.first), min(self.end, other.end))

    def holds(self, other: Span) -> bool:
        return self.first <= other.first < other.end <= self.end

    def since(self, origin: int) -> Span:
        """The same indices, counted from `origin`."""
        return Span(self.first - origin, self.end - origin)


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of a worker's KV cache. `dtype` is torch's name without its prefix ("bfloat16").

    `model` identifies the configuration, `weights` the weights, so that two models of one shape are told apart; of
    `weights`, "" tells nothing. `num_layers` and `num_kv_heads` are the whole model's; `layers` and `kv_heads` are what
    this rank holds of them, and if left empty it holds them all.

    Raises:
        ValueError: `layers` or `kv_heads` are not within the model's, or a size is not positive.
    """

    model: str
    num_layers: int
    kv_factor: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: str
    layers: Span = Span(0, 0)
    kv_heads: Span = Span(0, 0)
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0
    weights: str = ""

    def __post_init__(self) -> None:
        if min(self.num_layers, self.kv_factor, self.num_kv_heads, self.tokens_per_block, self.head_dim) < 1:
            raise ValueError("every size of a KV layout is at least 1")
        for name, held, there_are in (
            ("layers", self.layers, self.num_layers),
            ("kv_heads", self.kv_heads, self.num_kv_heads),
        ):
            whole = Span(0, there_are)
            if held == Span(0, 0):
                msgspec.structs.force_setattr(self, name, whole)
            elif not whole.holds(held):
                raise ValueError(f"{name} {held.first} to {held.end} are not within the model's {there_are}")

    def hash(self) -> str:
        """16 hex digits; equal exactly when every field is."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]

    def compare(self, other: KvLayout) -> LayoutMismatch | None:
        """None when KV of `other` can be brought here; otherwise the error that names the first field that differs."""
        for field in SAME:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return LayoutMismatch(f"the KV layouts differ in {field}: {ours!r} here, {theirs!r} there", field)
        if is_another_model(self.weights, other.weights):
            return LayoutMismatch(
                f"the KV layouts differ in weights: {self.weights!r} here, {other.weights!r} there", "weights"
            )
        if self.dtype != other.dtype and not {self.dtype, other.dtype} <= CONVERTIBLE:
            return LayoutMismatch(f"KV of {other.dtype} there can't be converted to {self.dtype} here", "dtype")
        return None

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, kv_factor, kv_heads, tokens_per_block, head_dim]` of this rank."""
        return self.layers.size, self.kv_factor, self.kv_heads.size, self.tokens_per_block, self.head_dim


@dataclass(frozen=True)
class KvPoolView:
    """A pool of blocks: `tensor` is `[num_blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`.

    Raises:
        ValueError: the tensor is not contiguous, or not of `layout`'s shape and dtype.
    """

    tensor: Tensor
    layout: KvLayout

    def __post_init__(self) -> None:
        expected = self.layout.block_shape
        if tuple(self.tensor.shape[1:]) != expected:
            raise ValueError(f"a block of the pool is {tuple(self.tensor.shape[1:])}, its layout says {expected}")
        if str(self.tensor.dtype) != f"torch.{self.layout.dtype}":
            raise ValueError(f"the pool holds {self.tensor.dtype}, its layout says {self.layout.dtype}")
        if not self.tensor.is_contiguous():
            raise ValueError("the pool's tensor must be contiguous")

    @property
    def num_blocks(self) -> int:
        return self.tensor.shape[0]

    @cached_property
    def block_bytes(self) -> int:
        return self.tensor[0].numel() * self.tensor.element_size()


def split(count: int, parts: int, index: int) -> Span:
    """Part `index` of `count` things in a row, as even as can be; the first parts get one more.

    With more parts than things every part has one, and neighbours hold the same: this is how KV heads are replicated.
    """
    if parts > count:
        return Span(index * count // parts, index * count // parts + 1)
    each, more = divmod(count, parts)
    first = index * each + min(index, more)
    return Span(first, first + each + (index < more))

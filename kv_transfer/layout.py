"""What a rank's share of the KV cache looks like, so that two workers can tell before the first byte if they fit.

A cache is groups of layers that are kept alike, each with a pool of blocks and a block table a sequence of its own.
Owns the description and its comparison, not the memory: the engine allocates the pools and keeps them alive. Which rank
sends what to which other is `routes`'.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from pdserve.errors import LayoutMismatch
from pdserve.protocol import is_another_model

Tables = tuple[tuple[int, ...], ...]
"""A sequence's block table in each group: ids of blocks, -1 where there is none."""

Kind = Literal["full", "window", "latent", "state"]
"""How a group remembers: every token, the last `window` tokens, a compressed form of every token, or one state for the
whole sequence."""

SAME = ("kind", "window", "num_layers", "layer_ids", "kv_factor", "num_kv_heads", "head_dim")
"""The fields of a group that must be equal at two workers. Block sizes, number types and the ranks' parts may
differ."""

CONVERTIBLE = frozenset({"float32", "bfloat16", "float16", "float8_e4m3fn"})
"""Number types that are converted into each other on the way; a value beyond the target's range becomes its limit."""


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


ALL = Span(0, -1)
"""All layers, or all heads, of the model."""


class GroupLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of a cache group.

    Attributes:
        num_layers, num_kv_heads: of the group, on all ranks together.
        dtype: torch's name without its prefix ("bfloat16").
        kind: as `CacheSpec.kind`. A "state" takes one position in a block of one, however long the sequence is.
        window: in tokens, the one that attends included; 0 unless `kind` is "window".
        layer_ids: the numbers of the group's layers in the model, ascending; by default all layers of the model.
        layers: which of the group's layers this rank holds; `Span(0, 0)` if none.
        kv_heads: which KV heads this rank holds.

    Raises:
        ValueError: `layers` or `kv_heads` are not within the group's, or other fields contradict each other.
    """

    num_layers: int
    kv_factor: int
    num_kv_heads: int
    tokens_per_block: int
    head_dim: int
    dtype: str
    kind: Kind = "full"
    window: int = 0
    layer_ids: tuple[int, ...] = ()
    layers: Span = ALL
    kv_heads: Span = ALL

    def __post_init__(self) -> None:
        if min(self.num_layers, self.kv_factor, self.num_kv_heads, self.tokens_per_block, self.head_dim) < 1:
            raise ValueError("every size of a KV layout is at least 1")
        if (self.window > 0) is not (self.kind == "window") or (self.kind == "state" and self.tokens_per_block != 1):
            raise ValueError(
                f"a window of {self.window}, blocks of {self.tokens_per_block}: no {self.kind} group has that"
            )
        if not self.layer_ids:
            msgspec.structs.force_setattr(self, "layer_ids", tuple(range(self.num_layers)))
        if len(self.layer_ids) != self.num_layers or list(self.layer_ids) != sorted(set(self.layer_ids)):
            raise ValueError(f"the layers {self.layer_ids} are not {self.num_layers} different ones in order")
        for name, held, there_are in (
            ("layers", self.layers, self.num_layers),
            ("kv_heads", self.kv_heads, self.num_kv_heads),
        ):
            whole = Span(0, there_are)
            if held == ALL:
                msgspec.structs.force_setattr(self, name, whole)
            elif not whole.holds(held) and not (name == "layers" and held == Span(0, 0)):
                raise ValueError(f"{name} {held.first} to {held.end} are not within the model's {there_are}")

    def compare(self, other: GroupLayout) -> LayoutMismatch | None:
        """As `KvLayout.compare`."""
        for field in SAME:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return _differ(field, ours, theirs)
        if self.dtype != other.dtype and not {self.dtype, other.dtype} <= CONVERTIBLE:
            return LayoutMismatch(f"KV of {other.dtype} there can't be converted to {self.dtype} here", "dtype")
        return None

    def within(self, layers: Span) -> Span:
        """Which of the group's layers, counted within the group, are among `layers` of the model."""
        return Span(bisect_left(self.layer_ids, layers.first), bisect_left(self.layer_ids, layers.end))

    def needed(self, num_tokens: int, num_cached_tokens: int, unit: int) -> Span:
        """The positions that a handoff of `num_tokens` tokens moves.

        Args:
            num_cached_tokens: first tokens that the receiver has already.
            unit: pieces are cut at multiples of so many positions.
        """
        if self.kind == "state":
            return Span(0, 1)
        if self.window:
            first = max(0, num_tokens - self.window + 1) // unit * unit
            return Span(max(num_cached_tokens, first), num_tokens)
        return Span(num_cached_tokens, num_tokens)

    def is_named(self, table: Sequence[int], num_tokens: int) -> bool:
        """Whether `table`, a sequence's block table, names all blocks that a handoff of `num_tokens` tokens moves."""
        if not self.window:
            return len(table) >= self.num_blocks(num_tokens)
        used = table[self.needed(num_tokens, 0, self.tokens_per_block).first // self.tokens_per_block :]
        return len(table) >= self.num_blocks(num_tokens) and min(used, default=0) >= 0

    def positions(self, num_computed: int, num_tokens: int) -> int:
        """How many positions of a sequence of `num_tokens` tokens are final once `num_computed` tokens are computed."""
        return num_computed if self.kind != "state" else int(num_computed >= num_tokens)

    def num_blocks(self, num_tokens: int) -> int:
        """Entries of the block table of a sequence of `num_tokens` tokens."""
        return -(-self.positions(num_tokens, num_tokens) // self.tokens_per_block)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, kv_factor, kv_heads, tokens_per_block, head_dim]` of this rank."""
        return self.layers.size, self.kv_factor, self.kv_heads.size, self.tokens_per_block, self.head_dim


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's part of a worker's KV cache, group by group.

    `model` identifies the configuration, `weights` the weights, so that two models of one shape are told apart; of
    `weights`, "" tells nothing.

    Raises:
        ValueError: there is no group, or this rank holds no layer.
    """

    model: str
    groups: tuple[GroupLayout, ...]
    weights: str = ""

    def __post_init__(self) -> None:
        if not any(group.layers.size for group in self.groups):
            raise ValueError("a rank holds a layer of some group")

    def hash(self) -> str:
        """16 hex digits; equal exactly when every field is."""
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()[:16]

    def compare(self, other: KvLayout) -> LayoutMismatch | None:
        """None when KV of `other` can be brought here; otherwise the error that names the first field that differs."""
        if self.model != other.model:
            return _differ("model", self.model, other.model)
        if len(self.groups) != len(other.groups):
            return _differ("groups", len(self.groups), len(other.groups))
        for ours, theirs in zip(self.groups, other.groups, strict=True):
            if (mismatch := ours.compare(theirs)) is not None:
                return mismatch
        if is_another_model(self.weights, other.weights):
            return _differ("weights", self.weights, other.weights)
        return None

    def whole(self) -> KvLayout:
        """The same of a worker whose one rank holds everything."""
        groups = [msgspec.structs.replace(group, layers=ALL, kv_heads=ALL) for group in self.groups]
        return msgspec.structs.replace(self, groups=tuple(groups))

    @property
    def layers(self) -> Span:
        """The model's layers from the first to the last one that this rank holds."""
        held = [group.layer_ids[group.layers.first : group.layers.end] for group in self.groups if group.layers.size]
        return Span(min(ids[0] for ids in held), max(ids[-1] for ids in held) + 1)


def _differ(field: str, ours: object, theirs: object) -> LayoutMismatch:
    return LayoutMismatch(f"the KV layouts differ in {field}: {ours!r} here, {theirs!r} there", field)


@dataclass(frozen=True)
class GroupPool:
    """A group's blocks: `tensor` is `[num_blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`.

    Raises:
        ValueError: the tensor is not contiguous, or not of `layout`'s shape and dtype.
    """

    tensor: Tensor
    layout: GroupLayout

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


@dataclass(frozen=True)
class KvPoolView:
    """The blocks of all groups of a rank, one tensor a group, on one device. Raises `ValueError`, as `GroupPool`."""

    tensors: Sequence[Tensor]
    layout: KvLayout

    def __post_init__(self) -> None:
        if len({tensor.device for tensor in self.tensors}) != 1:
            raise ValueError("the pools of all groups must be on one device")
        assert self.groups, "they are looked at as soon as there is a view"

    @cached_property
    def groups(self) -> tuple[GroupPool, ...]:
        return tuple(GroupPool(*pair) for pair in zip(self.tensors, self.layout.groups, strict=True))

    @cached_property
    def layers(self) -> Span:
        """As `KvLayout.layers`."""
        return self.layout.layers

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of a layer and a head in all groups of this rank."""
        return sum(group.layers.size * group.kv_heads.size for group in self.layout.groups)

    @cached_property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def split(count: int, parts: int, index: int) -> Span:
    """Part `index` of `count` things in a row, as even as can be; the first parts get one more.

    With more parts than things every part has one, and neighbours hold the same: this is how KV heads are replicated.
    """
    if parts > count:
        return Span(index * count // parts, index * count // parts + 1)
    each, more = divmod(count, parts)
    first = index * each + min(index, more)
    return Span(first, first + each + (index < more))

"""Who sends what to whom, between the ranks of two workers whose pools are cut up differently.

Arithmetic over layouts, no state. A worker's cache is layers times KV heads; tensor parallelism cuts the heads,
pipeline parallelism the layers, each evenly or not, and where ranks outnumber heads several hold the same one. Each
receiver rank gets each of its (layer, head) pairs once, from one rank that has it; ranks that hold the same take turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from kv_transfer.layout import KvLayout, Span
from kv_transfer.pieces import Piece, num_blocks
from pdserve.errors import LayoutMismatch


class Share(NamedTuple):
    """What one rank sends to one other: these layers and heads of the model, of every token that is sent."""

    layers: Span
    kv_heads: Span

    @property
    def pairs(self) -> int:
        return self.layers.size * self.kv_heads.size

    def overlap(self, other: Share) -> Share:
        return Share(self.layers.overlap(other.layers), self.kv_heads.overlap(other.kv_heads))


class Route(NamedTuple):
    """Ranks are indices into their worker's layouts."""

    sender: int
    receiver: int
    share: Share


def held_by(layout: KvLayout) -> Share:
    """All that a rank holds."""
    return Share(layout.layers, layout.kv_heads)


def routes(senders: Sequence[KvLayout], receivers: Sequence[KvLayout]) -> list[Route]:
    """Every pair of ranks that has something to exchange, receiver by receiver.

    Raises:
        LayoutMismatch: two ranks' layouts don't fit, or the senders don't hold each pair of a receiver exactly once
            (replicas apart); `param` names the field.
    """
    found: list[Route] = []
    turns: dict[Span, int] = {}
    holders: dict[Share, list[int]] = {}
    for rank, sender in enumerate(senders):
        holders.setdefault(held_by(sender), []).append(rank)
    for rank, receiver in enumerate(receivers):
        turn = turns.setdefault(receiver.kv_heads, 0)
        turns[receiver.kv_heads] += 1
        chosen = []
        for held, ranks in holders.items():
            share = held.overlap(held_by(receiver))
            if share.pairs:
                chosen.append(Route(ranks[turn % len(ranks)], rank, share))
        for route in chosen:
            if (error := receiver.compare(senders[route.sender])) is not None:
                raise error
        _check_cover(receiver, [route.share for route in chosen])
        found += chosen
    return found


def _check_cover(receiver: KvLayout, shares: list[Share]) -> None:
    wanted = held_by(receiver)
    if not any(a.overlap(b).pairs for a, b in combinations(shares, 2)):
        if sum(share.pairs for share in shares) == wanted.pairs:
            return
        layers = {layer for share in shares for layer in range(*share.layers)}
        if len(layers) < wanted.layers.size:
            raise LayoutMismatch(f"nobody holds all of the layers {wanted.layers} that a rank needs", "layers")
    raise LayoutMismatch(f"the KV heads {wanted.kv_heads} that a rank needs are not held once each", "kv_heads")


@dataclass(frozen=True)
class Packing:
    """How the share of two ranks is packed.

    With `whole_blocks` a message is `[blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`: both pools'
    blocks are alike but for their layers, and pieces of a block are copied as they are. Otherwise it is
    `[layers, kv_factor, kv_heads, tokens, head_dim]` of `dtype`, the smaller of the two pools' types, and whoever has
    the other converts. `cell_bytes` is what one token takes in one layer; a message starts at a multiple of
    `unit_tokens`, and ends at one or with the sequence.
    """

    share: Share
    whole_blocks: bool
    dtype: str
    unit_tokens: int
    cell_bytes: int

    def nbytes(self, piece: Piece) -> int:
        """The size of the message that carries `piece`."""
        tokens = num_blocks(piece.tokens.size, self.unit_tokens) * self.unit_tokens
        return tokens * piece.layers.size * self.cell_bytes

    def max_units(self, max_bytes: int) -> int:
        """Units (of tokens, in one layer) that fit into a message."""
        return max_bytes // (self.unit_tokens * self.cell_bytes)


def packing(sender: KvLayout, receiver: KvLayout, share: Share) -> Packing:
    """How `share` travels between two ranks.

    Raises:
        LayoutMismatch: they don't fit, or one of them doesn't hold the share.
    """
    if (error := receiver.compare(sender)) is not None:
        raise error
    for field, part in zip(("layers", "kv_heads"), share, strict=True):
        if not all(getattr(layout, field).holds(part) for layout in (sender, receiver)):
            raise LayoutMismatch(f"{field} {part.first} to {part.end} are not held by both ranks", field)
    alike = ("tokens_per_block", "dtype", "kv_heads")
    whole = all(getattr(sender, field) == getattr(receiver, field) for field in alike)
    dtype = min(receiver.dtype, sender.dtype, key=_bytes_of)
    cell_bytes = sender.kv_factor * share.kv_heads.size * sender.head_dim * _bytes_of(dtype)
    whole = whole and share.kv_heads == sender.kv_heads
    return Packing(share, whole, dtype, receiver.tokens_per_block if whole else 1, cell_bytes)


def _bytes_of(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]

"""Who sends what to whom, between the ranks of two workers whose pools are cut up differently, and how it is packed.

Arithmetic over layouts, no state. A group of a worker's cache is layers times KV heads; tensor parallelism cuts the
heads, pipeline parallelism the layers, each evenly or not, and where ranks outnumber heads several hold the same one.
Each receiver rank gets each of its (layer, head) pairs once, from one rank that has it; ranks that hold the same take
turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch

from kv_transfer.layout import GroupLayout, KvLayout, Span
from kv_transfer.pieces import Piece, Wanted, num_blocks
from pdserve.errors import LayoutMismatch, TransferError


class Share(NamedTuple):
    """What one rank sends to one other of a group: these layers and heads, of every token that is sent."""

    layers: Span
    kv_heads: Span

    @property
    def pairs(self) -> int:
        return self.layers.size * self.kv_heads.size

    def overlap(self, other: Share) -> Share:
        return Share(self.layers.overlap(other.layers), self.kv_heads.overlap(other.kv_heads))


NOTHING = Share(Span(0, 0), Span(0, 0))

Shares = tuple[Share, ...]
"""One for each group of the cache."""


class Route(NamedTuple):
    """Ranks are indices into their worker's layouts."""

    sender: int
    receiver: int
    shares: Shares


def held_by(layout: KvLayout) -> Shares:
    """All that a rank holds."""
    return tuple(_held(group) for group in layout.groups)


def overlap(some: Shares, others: Shares) -> bool:
    """Whether a pair is in both."""
    return any(one.overlap(other).pairs for one, other in zip(some, others, strict=True))


def routes(senders: Sequence[KvLayout], receivers: Sequence[KvLayout]) -> list[Route]:
    """Every pair of ranks that has something to exchange, receiver by receiver.

    Raises:
        LayoutMismatch: two ranks' layouts don't fit, or the senders don't hold each pair of a receiver exactly once
            (replicas apart); `param` names the field.
    """
    found: dict[tuple[int, int], list[Share]] = {}
    num_groups = len(senders[0].groups)
    for each in receivers:
        if len(each.groups) != num_groups and (error := each.compare(senders[0])) is not None:
            raise error
    for group in range(num_groups):
        for rank, chosen in enumerate(_routes_of(group, senders, receivers)):
            for sender_rank, share in chosen:
                shares = found.setdefault((rank, sender_rank), [NOTHING] * num_groups)
                shares[group] = share
    return [Route(sender, receiver, tuple(shares)) for (receiver, sender), shares in sorted(found.items())]


def _routes_of(group: int, senders: Sequence[KvLayout], receivers: Sequence[KvLayout]) -> list[list[tuple[int, Share]]]:
    """For each receiver, who sends what of the group."""
    holders: dict[Share, list[int]] = {}
    for rank, sender in enumerate(senders):
        holders.setdefault(_held(sender.groups[group]), []).append(rank)
    turns: dict[Span, int] = {}
    found = []
    for receiver in receivers:
        wanted = receiver.groups[group]
        turn = turns.setdefault(wanted.kv_heads, 0)
        turns[wanted.kv_heads] += 1
        chosen = []
        for held, ranks in holders.items():
            share = held.overlap(_held(wanted))
            if share.pairs:
                sender_rank = ranks[turn % len(ranks)]
                if (error := receiver.compare(senders[sender_rank])) is not None:
                    raise error
                chosen.append((sender_rank, share))
        _check_cover(wanted, [share for _, share in chosen])
        found.append(chosen)
    return found


def _held(group: GroupLayout) -> Share:
    return Share(group.layers, group.kv_heads)


def _check_cover(receiver: GroupLayout, shares: list[Share]) -> None:
    wanted = _held(receiver)
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


@dataclass(frozen=True)
class Terms:
    """What a rank of a sender and one of a receiver have agreed on, as one of them sees it: `groups` are its own.

    KV goes in messages of at most `max_bytes`, or if the receiver `reads` it itself, in pieces of so many.
    """

    groups: tuple[GroupLayout, ...]
    packings: tuple[Packing, ...]
    max_bytes: int
    reads: bool = False

    @cached_property
    def shares(self) -> Shares:
        return tuple(packing.share for packing in self.packings)

    @cached_property
    def num_pairs(self) -> int:
        """Pairs of a layer and a head that are shared."""
        return sum(share.pairs for share in self.shares)

    @property
    def whole_blocks(self) -> bool:
        """Whether both pools' blocks are alike in every group that is shared."""
        return all(packing.whole_blocks for packing in self.packings if packing.share.pairs)

    def wanted(self, num_tokens: int, num_cached_tokens: int) -> list[Wanted]:
        """What a sequence of `num_tokens` tokens, of which the first `num_cached_tokens` are there, is cut out of."""
        return [
            Wanted(Piece(layers, group.needed(num_tokens, num_cached_tokens, unit), index), unit, max_units)
            for index, group, layers, unit, max_units in self._cuts
        ]

    def may_start_at(self, num_cached_tokens: int, num_tokens: int) -> bool:
        """Whether so many first tokens can be there already, in whole units."""
        if num_cached_tokens == num_tokens:
            return True
        whole = all(num_cached_tokens % unit == 0 for _, _, _, unit, _ in self._cuts)
        return whole and 0 <= num_cached_tokens < num_tokens

    @cached_property
    def _cuts(self) -> list[tuple[int, GroupLayout, Span, int, int]]:
        """Of each group that is shared: its number, itself, layers, unit, and units of a message."""
        return [
            (index, self.groups[index], packing.share.layers, packing.unit_tokens, packing.max_units(self.max_bytes))
            for index, packing in enumerate(self.packings)
            if packing.share.pairs
        ]


def agree(ours: KvLayout, sender: KvLayout, receiver: KvLayout, shares: Shares, max_bytes: int) -> Terms:
    """How `shares` travel between two ranks, of which one is ours.

    Raises:
        LayoutMismatch: they don't fit, or one of them doesn't hold the shares.
        TransferError: a message holds no token of one layer.
    """
    if (error := receiver.compare(sender)) is not None:
        raise error
    if len(shares) != len(ours.groups) or not any(share.pairs for share in shares):
        raise LayoutMismatch(f"{len(shares)} shares of {len(ours.groups)} groups hold nothing", "layers")
    groups = zip(sender.groups, receiver.groups, shares, strict=True)
    terms = Terms(ours.groups, tuple(packing(*each) for each in groups), max_bytes)
    if any(packed.share.pairs and packed.max_units(max_bytes) < 1 for packed in terms.packings):
        raise TransferError(f"a message of {max_bytes} bytes does not hold a token of one layer", "protocol")
    return terms


def packing(sender: GroupLayout, receiver: GroupLayout, share: Share) -> Packing:
    """How `share` of a group travels between two ranks whose layouts fit.

    Raises:
        LayoutMismatch: one of them doesn't hold the share.
    """
    for field, part in zip(("layers", "kv_heads"), share, strict=True):
        if share != NOTHING and not all(getattr(layout, field).holds(part) for layout in (sender, receiver)):
            raise LayoutMismatch(f"{field} {part.first} to {part.end} are not held by both ranks", field)
    alike = ("tokens_per_block", "dtype", "kv_heads")
    whole = all(getattr(sender, field) == getattr(receiver, field) for field in alike)
    dtype = min(receiver.dtype, sender.dtype, key=_bytes_of)
    cell_bytes = sender.kv_factor * share.kv_heads.size * sender.head_dim * _bytes_of(dtype)
    whole = whole and share.kv_heads == sender.kv_heads
    return Packing(share, whole, dtype, receiver.tokens_per_block if whole else 1, cell_bytes)


def _bytes_of(dtype: str) -> int:
    return getattr(torch, dtype).itemsize  # type: ignore[no-any-return]

"""Which rank of a sender sends what to which rank of a receiver, and how it is packed. Both sides compute the same.

Arithmetic over layouts, no state. The two workers may be cut differently. A cache group is a rectangle of layers and KV
heads: tensor parallelism cuts the heads, pipeline parallelism the layers, each evenly or not. Where there are more
ranks than heads, several ranks hold the same head. Each rank of the receiver gets each (layer, head) pair that it needs
once, from one rank that holds it; ranks that hold the same pairs take turns.
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
    """The layers and KV heads of one cache group that one rank sends to one rank of the peer, for every token sent."""

    layers: Span
    kv_heads: Span

    @property
    def pairs(self) -> int:
        return self.layers.size * self.kv_heads.size

    def overlap(self, other: Share) -> Share:
        return Share(self.layers.overlap(other.layers), self.kv_heads.overlap(other.kv_heads))


NOTHING = Share(Span(0, 0), Span(0, 0))

Shares = tuple[Share, ...]
"""A `Share` for each cache group, `NOTHING` where none of it is sent."""


class Route(NamedTuple):
    """`sender` and `receiver` are rank numbers, each in its own worker; `shares` go from the one to the other."""

    sender: int
    receiver: int
    shares: Shares


def held_by(layout: KvLayout) -> Shares:
    """All layers and heads that the rank of this layout holds."""
    return tuple(_held(group) for group in layout.groups)


def overlap(some: Shares, others: Shares) -> bool:
    """Whether a (layer, head) pair of any group is in both."""
    return any(one.overlap(other).pairs for one, other in zip(some, others, strict=True))


def routes(senders: Sequence[KvLayout], receivers: Sequence[KvLayout]) -> list[Route]:
    """A route for every two ranks that have something to exchange, in the order of receivers.

    Args:
        senders, receivers: the layout of each rank of the two workers.

    Raises:
        LayoutMismatch: the layouts of two ranks don't fit; or a pair that a receiver needs is held by no sender, or by
            two that do not hold the same pairs. `param` names the field.
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
    """For each receiver: which senders send what of cache group number `group`."""
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
    """How a share of one cache group is laid out in messages.

    Attributes:
        whole_blocks: True: both pools' blocks are alike but for their layers, so parts of blocks are copied as they
            are, and a message is `[blocks, layers, kv_factor, kv_heads, tokens_per_block, head_dim]`. False: a message
            is `[layers, kv_factor, kv_heads, tokens, head_dim]`.
        dtype: of the message: the smaller of the two pools' types. The side that has the other type converts.
        unit_tokens: a message starts at a multiple of so many tokens, and ends at one or with the sequence.
        cell_bytes: what one token takes in one layer.
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
        """How many units, each of `unit_tokens` tokens in one layer, fit into `max_bytes`."""
        return max_bytes // (self.unit_tokens * self.cell_bytes)


@dataclass(frozen=True)
class Terms:
    """What two ranks, a sender's and a receiver's, have agreed on, as one of them sees it.

    Attributes:
        groups: its own cache groups.
        packings: how the share of each group is packed.
        max_bytes: the largest message; if the receiver `reads`, the largest piece.
        reads: whether the receiver reads the sender's pool itself, without messages of KV.
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
        """How many (layer, head) pairs are shared, of all groups."""
        return sum(share.pairs for share in self.shares)

    @property
    def whole_blocks(self) -> bool:
        """Whether both pools' blocks are alike in every group that is shared."""
        return all(packing.whole_blocks for packing in self.packings if packing.share.pairs)

    def wanted(self, num_tokens: int, num_cached_tokens: int) -> list[Wanted]:
        """What one handoff moves, group by group: `num_tokens` tokens without the first `num_cached_tokens`, which the
        receiver has."""
        return [
            Wanted(Piece(layers, group.needed(num_tokens, num_cached_tokens, unit), index), unit, max_units)
            for index, group, layers, unit, max_units in self._cuts
        ]

    def may_start_at(self, num_cached_tokens: int, num_tokens: int) -> bool:
        """Whether a receiver may have the first `num_cached_tokens` of `num_tokens` tokens: whole units, or all."""
        if num_cached_tokens == num_tokens:
            return True
        whole = all(num_cached_tokens % unit == 0 for _, _, _, unit, _ in self._cuts)
        return whole and 0 <= num_cached_tokens < num_tokens

    @cached_property
    def _cuts(self) -> list[tuple[int, GroupLayout, Span, int, int]]:
        """(number, group, shared layers, unit_tokens, units of a message) of each group that is shared."""
        return [
            (index, self.groups[index], packing.share.layers, packing.unit_tokens, packing.max_units(self.max_bytes))
            for index, packing in enumerate(self.packings)
            if packing.share.pairs
        ]


def agree(ours: KvLayout, sender: KvLayout, receiver: KvLayout, shares: Shares, max_bytes: int) -> Terms:
    """The terms of `shares` between two ranks, of which `ours` is one.

    Raises:
        LayoutMismatch: the layouts don't fit, or one of the ranks doesn't hold the shares.
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
    """The packing of `share` of one group between two ranks whose layouts fit.

    Raises:
        LayoutMismatch: one of the ranks doesn't hold the share.
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

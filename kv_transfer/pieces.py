"""Which part of a sequence goes in which message. Arithmetic only: no tensors, no messages, no clock.

KV becomes ready in the order of computation: chunk by chunk of the prompt, and within a chunk layer by layer. A message
carries a `Piece`, a rectangle of some layers and some tokens. A sender's `Cursor` cuts pieces from what is ready and
not yet sent; a receiver's `Coverage` checks that none overlaps another.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from kv_transfer.layout import Span

READ_BYTES = 1 << 30
"""The largest piece that is read from another pool in one copy. Other handoffs wait for it, 3 ms at most; in pieces of
256 MiB, 1 GiB takes 1 % longer."""

CHECKED_READ_BYTES = 16 << 20
"""The same with checksums: that of one piece takes the thread some 20 ms, in which it answers no peer."""

READ_BYTES_PER_S = 370e9
"""Measured over the NVLink of an H200 with one read at a time."""

MAX_IN_FLIGHT = 8
"""Messages of one handoff at a time: more would not be quicker, and would make the others wait."""


def read_bytes(checked: bool) -> int:
    """The largest piece that is read in one copy; `checked`: with checksums."""
    return min(READ_BYTES, CHECKED_READ_BYTES) if checked else READ_BYTES


def reading_s(nbytes: int) -> float:
    """The least seconds that reading `nbytes` out of another GPU takes."""
    return nbytes / READ_BYTES_PER_S


class Piece(NamedTuple):
    """A rectangle of a sequence's KV.

    Attributes:
        layers: layers of the group.
        tokens: positions of tokens. A state has one position.
        group: the number of the cache group.
    """

    layers: Span
    tokens: Span
    group: int = 0

    @property
    def cells(self) -> int:
        return self.layers.size * self.tokens.size

    def overlaps(self, other: Piece) -> bool:
        return bool(self.layers.overlap(other.layers).size and self.tokens.overlap(other.tokens).size)


def num_blocks(num_tokens: int, tokens_per_block: int) -> int:
    """Blocks that `num_tokens` tokens take."""
    return -(-num_tokens // tokens_per_block)


def messages(layers: int, units: int, max_units: int) -> int:
    """The least number of messages for a rectangle of `layers` layers and `units` units of tokens.

    `max_units` is how many units, each in one layer, fit into a message. The number is exact if the whole rectangle is
    ready at once and a message holds one unit in all its layers.
    """
    if layers <= max_units:
        return -(-units // (max_units // layers))
    return -(-units * layers // max_units)


class Frontier:
    """How many of a sequence's first tokens are done in each layer. `bands` groups neighbouring layers that are equally
    far: (layers, tokens done)."""

    def __init__(self, layers: Span, tokens: int = 0) -> None:
        self.layers = layers
        self.bands: list[tuple[Span, int]] = [(layers, tokens)]

    def advance(self, tokens: int, layers: Span) -> None:
        """Note that the first `tokens` tokens are done in `layers`. A layer that is further already stays there."""
        bands: list[tuple[Span, int]] = []
        for band, done in self.bands:
            inside = band.overlap(layers)
            if not inside.size or tokens <= done:
                _append(bands, band, done)
                continue
            _append(bands, Span(band.first, inside.first), done)
            _append(bands, inside, tokens)
            _append(bands, Span(inside.end, band.end), done)
        self.bands = bands

    def reached(self, layers: Span) -> int:
        """Tokens that are done in all of `layers`, which lie within this frontier's."""
        return min(done for band, done in self.bands if band.overlap(layers).size)


def _append(bands: list[tuple[Span, int]], band: Span, done: int) -> None:
    if not band.size:
        return
    if bands and bands[-1][1] == done:
        bands[-1] = (Span(bands[-1][0].first, band.end), done)
    else:
        bands.append((band, done))


class Coverage:
    """Which cells of a rectangle have come, so that a receiver counts none twice.

    A sender cuts pieces in order within each layer, but they may arrive in another order. At most `ahead` pieces may
    come before pieces that precede them.
    """

    def __init__(self, wanted: Piece, ahead: int = MAX_IN_FLIGHT) -> None:
        self._claimed = Frontier(wanted.layers, wanted.tokens.first)
        self._max_ahead = ahead
        self._ahead: list[Piece] = []

    def claim(self, piece: Piece) -> bool:
        """Note that `piece`, which lies within the rectangle, has come. Returns False if a cell of it had come before,
        or if too many pieces came out of order."""
        layers, first = piece.layers, piece.tokens.first
        if not self._ahead and self._claimed.bands == [(layers, first)]:  # all layers, next in order, as mostly
            self._claimed.bands = [(layers, piece.tokens.end)]
            return True
        done = [tokens for band, tokens in self._claimed.bands if band.overlap(layers).size]
        if max(done) > first or any(piece.overlaps(other) for other in self._ahead):
            return False
        if min(done) < first:
            self._ahead.append(piece)
            return len(self._ahead) <= self._max_ahead
        self._claimed.advance(piece.tokens.end, layers)
        if self._ahead:
            self._catch_up()
        return True

    def _catch_up(self) -> None:
        """Count the pieces ahead that nothing is missing before any more."""
        joined = True
        while joined:
            joined = False
            for piece in self._ahead:
                if self._claimed.reached(piece.layers) >= piece.tokens.first:
                    self._claimed.advance(piece.tokens.end, piece.layers)
                    self._ahead.remove(piece)
                    joined = True
                    break


class Wanted(NamedTuple):
    """The part of a sequence that one rank needs of another in one cache group, and how it may be cut.

    Attributes:
        piece: that part as one rectangle; it starts at a multiple of `unit` positions.
        unit: a cut stands at a multiple of so many positions, or at the end of `piece`.
        max_units: a piece has at most so many units, each of `unit` positions in one layer.
    """

    piece: Piece
    unit: int
    max_units: int

    @property
    def num_messages(self) -> int:
        """The least number of pieces that it is cut into."""
        return messages(self.piece.layers.size, num_blocks(self.piece.tokens.size, self.unit), self.max_units)

    def may_hold(self, piece: Piece) -> bool:
        """Whether `piece` lies within it and is cut where a sender may cut."""
        (layers, tokens, _), unit, whole = piece, self.unit, self.piece
        return (
            whole.layers.holds(layers)
            and whole.tokens.holds(tokens)
            and tokens.first % unit == 0
            and (tokens.end % unit == 0 or tokens.end == whole.tokens.end)
        )


class _Progress(NamedTuple):
    """One group: what is wanted, how far it is ready to be sent, and how far it has been cut."""

    wanted: Wanted
    ready: Frontier
    sent: Frontier


class Cursor:
    """Cuts pieces from what is `wanted` and ready. A sender has one for each share.

    Each cell is in exactly one piece, which is cut after the cell is ready. The earliest positions come first, with as
    many layers as fit. `taken` counts the pieces.
    """

    def __init__(self, wanted: Iterable[Wanted]) -> None:
        self.taken = 0
        self._groups: dict[int, _Progress] = {}
        for each in wanted:
            assert each.max_units >= 1, "a message holds a unit of one layer"
            (layers, tokens, group) = each.piece
            self._groups[group] = _Progress(each, Frontier(layers, tokens.first), Frontier(layers, tokens.first))
        self._waiting: list[Piece] = []

    def advance(self, done: int, layers: Span, group: int = 0) -> None:
        """Note that the first `done` positions of the sequence are ready in `layers` of the group."""
        (piece, unit, _), ready, _ = self._groups[group]
        end = piece.tokens.end
        ready.advance(end if done >= end else done - done % unit, layers)
        self._wait()

    def advance_all(self) -> None:
        """All may be sent."""
        for (piece, _, _), ready, _ in self._groups.values():
            ready.advance(piece.tokens.end, piece.layers)
        self._wait()

    @property
    def groups(self) -> Collection[int]:
        """The groups of which something is wanted."""
        return self._groups.keys()

    @property
    def has_next(self) -> bool:
        return bool(self._waiting)

    @property
    def num_ready(self) -> int:
        """The least number of pieces of all that is ready, those already taken included."""
        return self.taken + sum(self._messages(piece) for piece in self._waiting)

    def take(self) -> Piece:
        """Cut the next piece. Only if `has_next`."""
        layers, tokens, group = self._waiting[0]
        (_, unit, max_units), _, sent = self._groups[group]
        units = min(num_blocks(tokens.size, unit), max(1, max_units // layers.size))
        layers = Span(layers.first, min(layers.end, layers.first + max_units // units))
        piece = Piece(layers, Span(tokens.first, min(tokens.end, tokens.first + units * unit)), group)
        sent.advance(piece.tokens.end, layers)
        self.taken += 1
        self._wait()
        return piece

    def _messages(self, piece: Piece) -> int:
        _, unit, max_units = self._groups[piece.group].wanted
        return messages(piece.layers.size, num_blocks(piece.tokens.size, unit), max_units)

    def _wait(self) -> None:
        """Recompute what is ready and not cut, the earliest positions first."""
        self._waiting = [
            Piece(layers, Span(begin, end), group)
            for group, (_, ready, sent) in self._groups.items()
            for band, begin in sent.bands
            for other, end in ready.bands
            if begin < end and (layers := band.overlap(other)).size
        ]
        if len(self._waiting) > 1:
            self._waiting.sort(key=lambda piece: piece.tokens.first)

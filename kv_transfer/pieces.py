"""Which part of a sequence goes in which message. Arithmetic only, no state but a cursor.

KV becomes ready in the order of computation: chunk by chunk of the prompt, and within a chunk layer by layer. A message
carries a rectangle of that, some layers of some tokens, and is cut from what is ready and not yet sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from kv_transfer.layout import Span

READ_BYTES = 1 << 30
"""Largest piece that is read at once from another pool: other handoffs wait for it, 3 ms at most. In pieces of 256 MiB
1 GiB takes 1 % longer."""

CHECKED_READ_BYTES = 16 << 20
"""The same where each piece gets a checksum, which keeps the thread for some 20 ms: in between it answers its peers."""

READ_BYTES_PER_S = 370e9
"""Over the NVLink of an H200, nothing else being read."""

MAX_IN_FLIGHT = 8
"""Messages of one handoff at a time: more would not be quicker, and would make the others wait."""


def read_bytes(checked: bool) -> int:
    """Largest piece to be read at once."""
    return min(READ_BYTES, CHECKED_READ_BYTES) if checked else READ_BYTES


def reading_s(nbytes: int) -> float:
    """How soon `nbytes` may have been read out of another GPU."""
    return nbytes / READ_BYTES_PER_S


class Piece(NamedTuple):
    """A rectangle of a sequence's KV: layers of a group, positions of tokens (of a state, its only one)."""

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
    """Messages that a rectangle takes at least, where `max_units` units times layers fit into one: if it is ready at
    once and a message holds all its layers, exactly so many."""
    if layers <= max_units:
        return -(-units // (max_units // layers))
    return -(-units * layers // max_units)


class Frontier:
    """How many of a sequence's first tokens are done, layer by layer. Kept as bands of layers that are equally far."""

    def __init__(self, layers: Span, tokens: int = 0) -> None:
        self.layers = layers
        self.bands: list[tuple[Span, int]] = [(layers, tokens)]

    def advance(self, tokens: int, layers: Span) -> None:
        """The first `tokens` tokens are done in `layers`; never moves back."""
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
    """Which cells of a rectangle have been claimed, so that none is counted twice.

    A sender cuts pieces in order, layer by layer; `ahead` of those before them may be as many as are under way at once.
    """

    def __init__(self, wanted: Piece, ahead: int = MAX_IN_FLIGHT) -> None:
        self._claimed = Frontier(wanted.layers, wanted.tokens.first)
        self._max_ahead = ahead
        self._ahead: list[Piece] = []

    def claim(self, piece: Piece) -> bool:
        """Take note of `piece`, which lies within the rectangle; False if a cell of it was claimed before, or too many
        pieces are ahead."""
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
        """Packing what was ahead to what has come up to it."""
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
    """What of a group is to be cut into pieces of at most `max_units` units (of positions, in one layer). A piece
    starts at a multiple of `unit` positions, as `piece` does, and ends at one, or with `piece`."""

    piece: Piece
    unit: int
    max_units: int

    @property
    def num_messages(self) -> int:
        """How many pieces there will be at least."""
        return messages(self.piece.layers.size, num_blocks(self.piece.tokens.size, self.unit), self.max_units)

    def may_hold(self, piece: Piece) -> bool:
        """Whether `piece` is part of it, and cut where a sender may cut."""
        (layers, tokens, _), unit, whole = piece, self.unit, self.piece
        return (
            whole.layers.holds(layers)
            and whole.tokens.holds(tokens)
            and tokens.first % unit == 0
            and (tokens.end % unit == 0 or tokens.end == whole.tokens.end)
        )


class _Progress(NamedTuple):
    """Of a group: what is ready, and what of that is cut."""

    wanted: Wanted
    ready: Frontier
    sent: Frontier


class Cursor:
    """Cuts what is ready of what is `wanted` of each group.

    Each cell is in one piece, and none is there before it is ready. The earliest positions come first, with as many
    layers as fit.
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
        """The first `done` positions of the sequence may be sent in `layers` of the group."""
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
        """Those of which something is wanted."""
        return self._groups.keys()

    @property
    def has_next(self) -> bool:
        return bool(self._waiting)

    @property
    def num_ready(self) -> int:
        """Pieces that what is ready makes at least, with those already taken."""
        return self.taken + sum(self._messages(piece) for piece in self._waiting)

    def take(self) -> Piece:
        """The next piece; only when `has_next`."""
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
        """Find what is ready and not taken, the earliest positions first."""
        self._waiting = [
            Piece(layers, Span(begin, end), group)
            for group, (_, ready, sent) in self._groups.items()
            for band, begin in sent.bands
            for other, end in ready.bands
            if begin < end and (layers := band.overlap(other)).size
        ]
        if len(self._waiting) > 1:
            self._waiting.sort(key=lambda piece: piece.tokens.first)

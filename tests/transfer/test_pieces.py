"""Everything that is ready is sent exactly once, in messages that fit their buffers."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer import pieces
from kv_transfer.layout import Span


def cursor_of(layers: Span, first: int, end: int, unit: int, max_units: int) -> pieces.Cursor:
    """Of one group."""
    return pieces.Cursor([pieces.Wanted(pieces.Piece(layers, Span(first, end)), unit, max_units)])


@given(
    num_layers=st.integers(1, 9),
    num_tokens=st.integers(1, 60),
    unit=st.integers(1, 7),
    skipped_units=st.integers(0, 9),
    max_units=st.integers(1, 40),
    data=st.data(),
)
def test_messages_cover_each_cell_once_and_only_when_it_is_ready(
    num_layers: int, num_tokens: int, unit: int, skipped_units: int, max_units: int, data: st.DataObject
) -> None:
    """Readiness comes as computation has it: chunks of tokens, and within a chunk groups of layers, or all at once."""
    layers = Span(5, 5 + num_layers)
    first = min(skipped_units * unit, num_tokens)
    cursor = cursor_of(layers, first, num_tokens, unit, max_units)
    ready = Counter[int]()
    sent = Counter[tuple[int, int]]()
    chunks = sorted(data.draw(st.lists(st.integers(1, num_tokens), max_size=4)))
    for tokens in [*chunks, num_tokens]:
        ends = sorted(data.draw(st.sets(st.integers(6, 5 + num_layers), max_size=3)))
        for start, end in zip([5, *ends], [*ends, layers.end], strict=True):
            cursor.advance(tokens, Span(start, end))
            ready.update({layer: tokens - ready[layer] for layer in range(start, end)})
            while cursor.has_next and data.draw(st.booleans()):
                piece = cursor.take()
                units = pieces.num_blocks(piece.tokens.size, unit)
                assert 1 <= units * piece.layers.size <= max(max_units, 1)
                assert piece.tokens.first % unit == 0 or piece.tokens.first == first
                assert piece.tokens.end % unit == 0 or piece.tokens.end == num_tokens
                assert layers.holds(piece.layers)
                for layer in range(*piece.layers):
                    assert piece.tokens.end <= ready[layer]
                    sent.update((layer, token) for token in range(*piece.tokens))
    while cursor.has_next:
        piece = cursor.take()
        sent.update((layer, token) for layer in range(*piece.layers) for token in range(*piece.tokens))
    wanted = {(layer, token) for layer in range(*layers) for token in range(first, num_tokens)}
    assert set(sent) == wanted
    assert not wanted or set(sent.values()) == {1}


def test_a_message_takes_all_layers_of_the_earliest_tokens_first() -> None:
    cursor = cursor_of(Span(0, 4), 0, 100, 10, max_units=8)
    cursor.advance(50, Span(0, 2))
    assert cursor.num_ready == 2  # 4 units of 2 layers, and 1
    assert cursor.take() == pieces.Piece(Span(0, 2), Span(0, 40))
    cursor.advance(55, Span(0, 4))
    assert cursor.num_ready == 4
    assert cursor.take() == pieces.Piece(Span(2, 4), Span(0, 40))
    assert cursor.take() == pieces.Piece(Span(0, 4), Span(40, 50))
    assert not cursor.has_next
    narrow = cursor_of(Span(0, 4), 0, 20, 10, max_units=3)
    narrow.advance(20, Span(0, 4))
    assert narrow.num_ready == 3  # at least; there will be one more
    assert narrow.take() == pieces.Piece(Span(0, 3), Span(0, 10))
    assert narrow.take() == pieces.Piece(Span(3, 4), Span(0, 20))
    assert narrow.take() == pieces.Piece(Span(0, 3), Span(10, 20))
    assert not narrow.has_next


@given(layers=st.integers(1, 9), units=st.integers(0, 30), max_units=st.integers(1, 40), unit=st.integers(1, 5))
def test_messages_that_will_surely_come(layers: int, units: int, max_units: int, unit: int) -> None:
    """The receiver grants so many without being asked: no more than there will be, and all where layers fit."""
    cursor = cursor_of(Span(0, layers), 0, units * unit, unit, max_units)
    cursor.advance(units * unit, Span(0, layers))
    sure = pieces.messages(layers, units, max_units)
    assert cursor.num_ready == sure
    while cursor.has_next:
        cursor.take()
    assert sure <= cursor.taken
    assert sure == cursor.taken or layers > max_units


@given(
    steps=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8), st.integers(0, 9)), max_size=12),
    asked=st.tuples(st.integers(0, 7), st.integers(1, 8)),
)
def test_a_frontier_knows_the_slowest_of_its_layers(steps: list[tuple[int, int, int]], asked: tuple[int, int]) -> None:
    frontier, tokens = pieces.Frontier(Span(0, 8)), [0] * 8
    for done, first, size in steps:
        frontier.advance(done, Span(first, first + size))
        tokens = [max(t, done) if first <= i < first + size else t for i, t in enumerate(tokens)]
        bands = frontier.bands
        assert [(band.first, band.end) for band, _ in bands] == sorted((band.first, band.end) for band, _ in bands)
        assert all(left[1] != right[1] for left, right in pairwise(bands))
    layers = Span(asked[0], min(8, asked[0] + asked[1]))
    assert frontier.reached(layers) == min(tokens[layers.first : layers.end])

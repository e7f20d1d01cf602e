"""What has come of a share is counted once, in whatever pieces and order it comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.layout import Span
from kv_transfer.pieces import Coverage, Piece

WHOLE = Piece(Span(2, 5), Span(3, 9))


@st.composite
def some_pieces(draw: st.DrawFn) -> list[Piece]:
    """Rectangles within `WHOLE`, as they come."""

    def span(of: Span) -> Span:
        first = draw(st.integers(of.first, of.end - 1))
        return Span(first, draw(st.integers(first + 1, of.end)))

    return [Piece(span(WHOLE.layers), span(WHOLE.tokens)) for _ in range(draw(st.integers(1, 14)))]


def cells(of: Piece) -> set[tuple[int, int]]:
    return {(layer, token) for layer in range(*of.layers) for token in range(*of.tokens)}


@given(some_pieces())
def test_each_cell_can_be_claimed_once(pieces: list[Piece]) -> None:
    coverage, claimed = Coverage(WHOLE, ahead=len(pieces)), set[tuple[int, int]]()
    for each in pieces:
        is_new = claimed.isdisjoint(cells(each))
        assert coverage.claim(each) == is_new
        if not is_new:
            return  # the handoff is over
        claimed |= cells(each)


def test_only_so_many_pieces_may_be_ahead() -> None:
    coverage = Coverage(Piece(Span(0, 1), Span(0, 20)), ahead=2)
    assert [coverage.claim(Piece(Span(0, 1), Span(token, token + 1))) for token in (4, 2, 6)] == [True, True, False]

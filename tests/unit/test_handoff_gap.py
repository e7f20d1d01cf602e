"""The gap between a first token and its successor, as the proxy sees it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.handoff_gap import MIN_STEPS, HandoffGap


def gap_of(ends: list[tuple[int, int, float]]) -> float | None:
    gap = HandoffGap()
    for start, num_tokens, at in ends:
        gap.note(start, num_tokens, at)
    return gap.seconds()


def stream(first_at: float, *steps_s: float, chunk: int = 1) -> list[tuple[int, int, float]]:
    """A first token at 0, the next `chunk` tokens at `first_at`, and as many after each of `steps_s`."""
    ends, at = [(0, 1, 0.0), (1, chunk, first_at)], first_at
    for number, step_s in enumerate(steps_s, start=1):
        at += step_s
        ends.append((1 + number * chunk, chunk, at))
    return ends


def test_it_is_what_the_pace_of_the_choice_does_not_explain() -> None:
    assert gap_of(stream(0.5, 0.01, 0.01, 0.2, 0.01, 0.01)) == pytest.approx(0.49)
    assert gap_of(stream(0.5, 0.04, 0.04, 0.04, 0.04, 0.04, chunk=4)) == pytest.approx(0.46)


def test_a_stream_without_one_has_none_and_it_is_never_negative() -> None:
    assert gap_of(stream(0.005, *[0.01] * 8)) == 0.0
    tokens = stream(0.5, *[0.01] * 8)
    assert gap_of([*tokens[1:], tokens[0]]) == pytest.approx(0.49), "whatever comes first"
    assert gap_of([(0, 1, 9.0), *tokens[1:]]) == 0.0, "the first token may be overtaken"


def test_without_a_pace_or_a_first_token_nothing_is_said() -> None:
    assert gap_of(stream(0.5, *[0.01] * (MIN_STEPS - 1))) is None
    assert gap_of(stream(0.5, *[0.01] * MIN_STEPS)) is not None
    assert gap_of(stream(0.5, *[0.01] * 9)[1:]) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=30))
def test_tokens_in_any_order_and_again_are_no_harm(deltas: list[tuple[int, int]]) -> None:
    gap_s = gap_of([(start, count, float(at)) for at, (start, count) in enumerate(deltas)])
    assert gap_s is None or 0 <= gap_s < 30
    tokens = stream(0.5, *[0.01] * 8)
    assert gap_of([each for each in tokens for _ in range(2)]) == gap_of(tokens)


def test_a_long_stream_is_judged_by_its_beginning() -> None:
    assert gap_of(stream(1.0, *[0.01] * 64, *[0.3] * 500)) == pytest.approx(0.99)

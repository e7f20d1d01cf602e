"""Stop strings: exact text before them, whatever the cuts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.text.stop_strings import StopStrings


def run(pieces: list[str], stops: list[str], include: bool = False) -> tuple[str, bool]:
    watcher = StopStrings(stops, include)
    text = ""
    for piece in pieces:
        new, hit = watcher.push(piece)
        text += new
        if hit:
            return text, True
    return text + watcher.flush(), False


def expected(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """Character by character, by the definition."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end if include else end - max(map(len, hits))], True
    return text, False


@given(
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
)
def test_any_cut_gives_the_text_of_the_definition(pieces: list[str], stops: list[str], include: bool) -> None:
    assert run(pieces, stops, include) == expected("".join(pieces), stops, include)


def test_nothing_that_may_become_a_stop_string_is_released() -> None:
    watcher = StopStrings(["<end>"])
    assert watcher.push("text<e") == ("text", False)
    assert watcher.push("n") == ("", False)
    assert watcher.push("t") == ("<ent", False)
    assert watcher.push("<end") == ("", False)
    assert watcher.flush() == "<end"


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a\n\n")])
def test_the_stop_string_itself_is_left_out_unless_included(include: bool, text: str) -> None:
    assert run(["a\n", "\nb"], ["\n\n"], include) == (text, True)

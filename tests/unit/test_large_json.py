"""Decoding in pieces gives what decoding at once gives, errors included."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import large_json

TRICKY = st.text(alphabet='a,"}]{[\\ \n', max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | TRICKY,
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(TRICKY, inner, max_size=4),
    max_leaves=60,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_json, "PIECE_BYTES", 16)
    monkeypatch.setattr(large_json, "_LARGEST_PIECE_BYTES", 64)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")]))
def test_any_value_comes_out_whole(value: Any, separators: tuple[str, str]) -> None:
    raw = json.dumps({"messages": value, "n": [value, value]}, separators=separators).encode()
    assert large_json.decode(raw) == json.loads(raw)


@settings(max_examples=100, deadline=None)
@given(VALUES, st.integers(0, 2**20), st.sampled_from([b"", b",", b"]", b'"', b"{", b" "]))
def test_what_is_no_json_is_refused(value: Any, place: int, instead: bytes) -> None:
    raw = json.dumps([value, value], separators=(",", ":")).encode()
    place %= len(raw)
    raw = raw[:place] + instead + raw[place + 1 :]
    try:
        expected = msgspec.json.decode(raw)
    except msgspec.DecodeError:
        with pytest.raises(msgspec.DecodeError):
            large_json.decode(raw)
    else:
        assert large_json.decode(raw) == expected


@pytest.mark.parametrize("raw", [b"[" + b"1," * 40 + b"]", b"[" + b" " * 40 + b",1]", b"[1" + b" " * 40 + b",,1]"])
def test_commas_without_items_are_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        large_json.decode(raw)


def test_a_long_list_is_decoded_in_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = json.dumps({"prompt": list(range(1000, 3000))}).encode()
    sizes: list[int] = []

    def counted(part: bytes, **settings: Any) -> Any:
        sizes.append(len(part))
        return msgspec.json.decode(part, **settings)

    class Counted:
        json = type("json", (), {"decode": staticmethod(counted)})
        DecodeError = msgspec.DecodeError
        Raw = msgspec.Raw

    monkeypatch.setattr(large_json, "msgspec", Counted)
    assert large_json.decode(raw) == {"prompt": list(range(1000, 3000))}
    assert max(sizes[1:]) < 64, "after the first look at the whole"
    assert len(sizes) > 500

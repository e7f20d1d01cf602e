"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.text.detokenizer import WindowDetokenizer
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.proxy_cluster import byte_level_tokenizer, sentencepiece_tokenizer

RUST = {"byte_level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
TOKENIZERS = {name: Tokenizer(tokenizer) for name, tokenizer in RUST.items()}
KINDS = pytest.mark.parametrize("kind", list(TOKENIZERS))


def stream(kind: str, token_ids: list[int], skip: bool = True, context: tuple[int, ...] = ()) -> list[str]:
    detokenizer = TOKENIZERS[kind].detokenizer(skip, context)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@KINDS
@given(text=st.text(max_size=40))
def test_text_survives_the_round_trip(kind: str, text: str) -> None:
    token_ids = RUST[kind].encode(text, add_special_tokens=False).ids
    pieces = stream(kind, token_ids)
    assert "".join(pieces) == RUST[kind].decode(token_ids)
    if kind == "byte_level":
        assert "".join(pieces) == text


@given(token_ids=st.lists(st.integers(0, 299), max_size=60), skip=st.booleans())
def test_random_bytes_decode_as_the_library_decodes_them(token_ids: list[int], skip: bool) -> None:
    whole = RUST["byte_level"].decode(token_ids, skip_special_tokens=skip)
    assert "".join(stream("byte_level", token_ids, skip)) == whole


@KINDS
def test_a_character_of_several_tokens_appears_once_and_whole(kind: str) -> None:
    token_ids = RUST[kind].encode("ab🤖é", add_special_tokens=False).ids
    pieces = stream(kind, token_ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert "🤖" in pieces
    assert pieces.count("") >= 4, "the bytes before the last of a character say nothing"


@KINDS
def test_an_unfinished_character_comes_with_the_flush(kind: str) -> None:
    token_ids = RUST[kind].encode("a🤖", add_special_tokens=False).ids[:-1]
    pieces = stream(kind, token_ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert "\ufffd" in pieces[-1]


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = RUST["sentencepiece"]
    prompt, continuation = tokenizer.encode("hello").ids, tokenizer.encode("the fox", add_special_tokens=False).ids
    assert "".join(stream("sentencepiece", continuation, context=tuple(prompt))) == " the fox"
    assert "".join(stream("sentencepiece", continuation)) == "the fox"


@KINDS
def test_special_tokens_are_skipped_or_shown(kind: str) -> None:
    tokenizer = RUST[kind]
    special = 2
    token_ids = [*tokenizer.encode("a b", add_special_tokens=False).ids, special]
    assert "".join(stream(kind, token_ids)) == "a b"
    assert "".join(stream(kind, token_ids, skip=False)) == "a b" + tokenizer.id_to_token(special)


def test_a_special_token_in_between_does_not_hide_the_neighbour() -> None:
    first = RUST["sentencepiece"].encode("the", add_special_tokens=False).ids
    assert "".join(stream("sentencepiece", [*first, *[2] * 10, *first])) == "the the"


def test_the_window_stays_short() -> None:
    longest = 0

    def decode(token_ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(token_ids))
        return str(RUST["sentencepiece"].decode(token_ids, skip_special_tokens=False))

    detokenizer = WindowDetokenizer(decode, frozenset())
    broken_byte = RUST["sentencepiece"].token_to_id("<0xFF>")
    text = "".join(detokenizer.push(token_id) for token_id in [broken_byte] * 500) + detokenizer.flush()
    assert longest <= 16
    assert text == "\ufffd" * 500

"""Incremental detokenisation against decoding everything at once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders
from tokenizers import Tokenizer as RustTokenizer

from pdserve.text.detokenizer import WindowDetokenizer
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.proxy_cluster import byte_level_tokenizer, sentencepiece_tokenizer

RUST = {"byte_level": byte_level_tokenizer(), "sentencepiece": sentencepiece_tokenizer()}
TOKENIZERS = {name: Tokenizer(tokenizer) for name, tokenizer in RUST.items()}
KINDS = pytest.mark.parametrize("kind", list(TOKENIZERS))

ADDED = [
    AddedToken("<naïve>"),
    AddedToken("<|ü|>", special=True),
    AddedToken("¡\u00a0ÿ", normalized=False),
    AddedToken("Ġx", normalized=False),
    AddedToken("<｜end▁of▁turn｜>", special=True, normalized=False),
    AddedToken("日本", single_word=True),
    AddedToken("🙂", lstrip=True, rstrip=True),
    AddedToken("   ", normalized=False),
    AddedToken(" b", normalized=False),
    AddedToken("é"),  # in a byte-level vocabulary this is the byte 0xE9
]


def with_added_tokens(tokenizer: RustTokenizer) -> RustTokenizer:
    tokenizer.add_tokens(ADDED)
    tokenizer.add_special_tokens([token for token in ADDED if token.special])
    return tokenizer


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


BYTE_LEVEL_DECODERS = {
    "alone": decoders.ByteLevel(),
    "in a sequence": decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()]),
}
ADDED_TO_BYTES = with_added_tokens(byte_level_tokenizer())
ADDED_TO_PIECES = with_added_tokens(sentencepiece_tokenizer())
OWN_ADDED = {
    token_id: token.content
    for token_id, token in ADDED_TO_BYTES.get_added_tokens_decoder().items()
    if token.content != "é"
}


def expected_text(token_ids: list[int], skip: bool) -> str:
    """What transformers' reference does: runs of the model's own tokens as bytes, added tokens as they are written.

    The library's `decode` reads added tokens as bytes, too, which is wrong for letters from U+00A1 to U+00FF.
    """
    special = {token_id for token_id in OWN_ADDED if ADDED_TO_BYTES.get_added_tokens_decoder()[token_id].special}
    shown = [token_id for token_id in token_ids if not (skip and token_id in special)]
    text = ""
    for added, run in itertools.groupby(shown, OWN_ADDED.__contains__):
        ids = list(run)
        text += "".join(OWN_ADDED[token_id] for token_id in ids) if added else ADDED_TO_BYTES.decode(ids)
    return text


@pytest.mark.parametrize("decoder", BYTE_LEVEL_DECODERS)
@settings(deadline=None)
@given(
    token_ids=st.lists(
        st.integers(0, ADDED_TO_BYTES.get_vocab_size() - 1) | st.sampled_from([*OWN_ADDED]), max_size=40
    ),
    skip=st.booleans(),
)
def test_added_tokens_of_a_byte_level_model_are_their_own_text(decoder: str, token_ids: list[int], skip: bool) -> None:
    ADDED_TO_BYTES.decoder = BYTE_LEVEL_DECODERS[decoder]
    tokenizer = Tokenizer(ADDED_TO_BYTES)
    detokenizer = tokenizer.detokenizer(skip)
    text = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.flush()
    assert text == expected_text(token_ids, skip)
    assert tokenizer.decode(token_ids, skip) == text


@pytest.mark.parametrize("content", OWN_ADDED.values())
def test_an_added_token_comes_out_as_it_is_written(content: str) -> None:
    """Every kind, between letters; and so do its bytes beside a log-probability."""
    tokenizer = Tokenizer(ADDED_TO_BYTES)
    token_ids = [*tokenizer.encode_now("a"), *tokenizer.encode_now(content), *tokenizer.encode_now("z")]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    assert "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.flush() == f"a{content}z"
    assert tokenizer.token_bytes(token_ids[1]) == content.encode()


def test_a_letter_of_the_byte_alphabet_that_was_added_stays_a_byte() -> None:
    """Its id is the byte's: "日" holds it, and would be broken otherwise."""
    tokenizer = Tokenizer(ADDED_TO_BYTES)
    assert ADDED_TO_BYTES.token_to_id("é") < 256 + 3
    assert tokenizer.token_bytes(ADDED_TO_BYTES.token_to_id("é")) == b"\xe9"


PIECES = st.sampled_from(
    [token_id for piece, token_id in ADDED_TO_PIECES.get_vocab().items() if not piece.startswith("<0x")]
).map(lambda token_id: [token_id])
BYTES = st.text(min_size=1, max_size=3).map(
    lambda text: [ADDED_TO_PIECES.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
)


PIECE_DECODERS = {
    "byte fallback": ADDED_TO_PIECES.decoder,
    "metaspace": decoders.Metaspace(),
    "metaspace and byte fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
}


@pytest.mark.parametrize("decoder", PIECE_DECODERS)
@settings(deadline=None)
@given(
    parts=st.lists(PIECES | BYTES, max_size=30),
    skip=st.booleans(),
    context=st.lists(PIECES, max_size=9),
)
def test_added_tokens_among_pieces_and_bytes_decode_as_the_library_decodes_them(
    decoder: str, parts: list[list[int]], skip: bool, context: list[list[int]]
) -> None:
    """Bytes that are no text are not compared: for them the library takes back what it said of those before."""
    ADDED_TO_PIECES.decoder = PIECE_DECODERS[decoder]
    tokenizer = Tokenizer(ADDED_TO_PIECES)
    before = [token_id for part in context for token_id in part]
    token_ids = [token_id for part in parts for token_id in part]
    detokenizer = tokenizer.detokenizer(skip, before)
    text = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.flush()
    whole = ADDED_TO_PIECES.decode(before + token_ids, skip_special_tokens=skip)
    assert whole == ADDED_TO_PIECES.decode(before, skip_special_tokens=skip) + text

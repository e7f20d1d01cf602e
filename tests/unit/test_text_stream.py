"""The text pipeline of proxy and Python API: one text whatever the cuts, stop strings, stop tokens, places."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer
from tests.fakes.proxy_cluster import byte_level_tokenizer, sentencepiece_tokenizer

TOKENIZER = Tokenizer(byte_level_tokenizer())
SENTENCEPIECE = Tokenizer(sentencepiece_tokenizer())
END = 2
"""A special token."""


def tokens_of(text: str) -> list[int]:
    return TOKENIZER.encode_now(text)


def run(stream: TextStream, calls: list[list[int]]) -> tuple[str, list[int]]:
    """All text of `calls`, and where each of the tokens that were read starts."""
    text, offsets = "", list[int]()
    for token_ids in calls:
        text += stream.push(token_ids, offsets)
        if stream.stopped_by is not None:
            break
    return text + stream.flush(), offsets


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="aäß€🙂 .", max_size=12),
    stop=st.lists(st.sampled_from(["a", "ß€", "🙂.", "  "]), max_size=2),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    min_tokens=st.integers(0, 6),
    include_stop=st.booleans(),
)
def test_cuts_change_nothing(text: str, stop: list[str], cuts: list[int], min_tokens: int, include_stop: bool) -> None:
    tokens = [*tokens_of(text), END]
    ends = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})

    def result(calls: list[list[int]]) -> tuple[object, ...]:
        stream = TextStream(TOKENIZER, stop=stop, stop_ids={END}, include_stop=include_stop, min_tokens=min_tokens)
        return *run(stream, calls), stream.num_tokens, stream.stopped_by

    at_once = result([tokens])
    assert result([[token] for token in tokens]) == at_once
    assert result([tokens[start:end] for start, end in pairwise(ends)]) == at_once
    if min_tokens == 0:
        found = [at for each in stop if (at := text.find(each)) >= 0]
        shown = str(at_once[0])
        assert (shown if not include_stop else shown[: min(found, default=None)]) == text[: min(found, default=None)]


def test_a_stop_string_cuts_text_and_count_where_it_is_complete() -> None:
    stream = TextStream(TOKENIZER, stop=["lo wo", "never"])
    tokens = tokens_of("hello world, hello")
    text, offsets = run(stream, [tokens])
    assert (text, stream.stopped_by) == ("hel", "lo wo")
    assert offsets == [len(TOKENIZER.decode(tokens[:before])) for before in range(stream.num_tokens)]
    assert "lo wo" in TOKENIZER.decode(tokens[: stream.num_tokens])
    assert "lo wo" not in TOKENIZER.decode(tokens[: stream.num_tokens - 1])
    assert stream.flush() == "", "it was flushed"


@pytest.mark.parametrize(
    ("include_stop", "min_tokens", "text"), [(False, 0, "ab"), (True, 0, "ab<|end|>"), (False, 9, "ab<|end|>")]
)
def test_a_stop_token_is_no_text_unless_it_is_wanted_or_cannot_end(
    include_stop: bool, min_tokens: int, text: str
) -> None:
    stream = TextStream(
        TOKENIZER, skip_special_tokens=False, stop_ids={0}, include_stop=include_stop, min_tokens=min_tokens
    )
    assert run(stream, [[*tokens_of("ab"), 0]])[0] == text
    assert stream.num_tokens == len(tokens_of("ab")) + 1


def test_what_is_held_back_may_complete_a_stop_string() -> None:
    stream = TextStream(TOKENIZER, stop=["\ufffd"])
    broken = TOKENIZER.encode_now("€", add_special_tokens=False)[:1]
    assert stream.push([*tokens_of("a"), *broken]) == "a"
    assert (stream.flush(), stream.stopped_by) == ("", "\ufffd")


def test_a_text_in_front_moves_the_places() -> None:
    stream = TextStream(TOKENIZER)
    stream.length = 10
    _, offsets = run(stream, [tokens_of("ab"), tokens_of("c")])
    assert offsets[0] == 10
    assert offsets[-1] == 12


def test_without_a_tokenizer_tokens_are_counted() -> None:
    stream = TextStream(None, stop_ids={4})
    assert run(stream, [[1, 2], [3, 4]]) == ("", [0, 0, 0, 0])
    assert stream.num_tokens == 4


def test_a_prompts_tokens_have_their_places_in_its_text() -> None:
    prompt = "the fox"
    token_ids = SENTENCEPIECE.encode_now(prompt)
    assert token_ids[0] == 1, "a token that stands in front"
    offsets = SENTENCEPIECE.offsets(token_ids, prompt)
    assert (offsets[0], offsets[1], len(offsets)) == (0, 0, len(token_ids))
    assert offsets == sorted(offsets)
    own = TOKENIZER.encode_now(prompt)
    ends = [*TOKENIZER.offsets(own, prompt)[1:], len(prompt)]
    assert [prompt[:end] for end in ends] == [TOKENIZER.decode(own[: n + 1]) for n in range(len(own))]

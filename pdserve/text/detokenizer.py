"""From tokens back to text, a few tokens at a time.

A detokenizer belongs to one choice. It never emits part of a UTF-8 sequence, never a U+FFFD for one that may still be
completed, and its text does not depend on how the tokens were grouped. Each token costs the same, however long the
text has become: nothing before the last finished character is decoded again.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 8
"""A character has at most four bytes, so what is no character after twice as many tokens will never be one."""


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str:
        """The text that became certain with `token_id`; often "" in the middle of a character."""

    def flush(self) -> str:
        """What is left at the end, with U+FFFD for a character that was never completed."""


class NoText:
    """Where there is no tokenizer, there is no text."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class ByteLevelDetokenizer:
    """For byte-level BPE, where every token is a byte string whatever stands around it.

    Args:
        token_bytes: bytes of each token id, of an added token those of its text; ids beyond it have none.
        skipped: ids without text (special tokens that are not wanted).
    """

    def __init__(self, token_bytes: Sequence[bytes], skipped: Collection[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not 0 <= token_id < len(self._token_bytes):
            return ""
        return self._decoder.decode(self._token_bytes[token_id])

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDetokenizer:
    """For every other tokenizer: decodes a short window of tokens before and after the new one and emits the
    difference, so that rules that look at neighbours (leading space, byte fallback) see them.

    Args:
        decode: token ids to text.
        skipped: ids without text; they never enter the window, where they would hide the real neighbour.
        context: the tokens before the first one (the end of the prompt).
    """

    def __init__(
        self, decode: Callable[[list[int]], str], skipped: Collection[int], context: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window = [token_id for token_id in context if token_id not in skipped]
        self._emitted = len(self._window)
        self._before = decode(self._window)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        pending = len(self._window) - self._emitted
        if text.endswith(_REPLACEMENT) and pending < _MAX_PENDING_TOKENS:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        return self._emit(self._decode(self._window))

    def _emit(self, text: str) -> str:
        new = text[len(self._before) :]
        if new or len(self._window) - self._emitted >= _MAX_PENDING_TOKENS:
            del self._window[: self._emitted]
            self._emitted = len(self._window)
            self._before = self._decode(self._window)
        return new

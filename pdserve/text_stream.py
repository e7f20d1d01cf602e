"""From the Python API's tokens to text, one token at a time, ending at stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# A character takes at most 4 bytes; what stays incomplete for longer is garbage, and waiting for it would be quadratic.
_MAX_HELD_TOKENS = 16


class Decoder(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """The text of one output.

    A token may hold part of a character, and how it is written may depend on the tokens before it. So each decoding
    starts at a token before the new ones, and its result counts only once it doesn't end in an incomplete character.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._decoder = decoder
        self._skip = skip_special_tokens
        self._stop = tuple(stop)
        self.include_stop = include_stop
        self._token_ids: list[int] = []
        self._context = 0
        self._done = 0

    @property
    def shown(self) -> str:
        """`text` without an end that may yet become a stop string."""
        if self.stopped_by is not None:
            return self.text
        return self.text[: len(self.text) - max((_overlap(self.text, stop) for stop in self._stop), default=0)]

    def push(self, token_id: int) -> bool:
        """Add a token; True if a stop string is complete now, at which `text` then ends."""
        self._token_ids.append(token_id)
        new = self._decode_new()
        if new.endswith(_INCOMPLETE) and len(self._token_ids) - self._done <= _MAX_HELD_TOKENS:
            return False
        self._take(new)
        return self.stopped_by is not None

    def flush(self) -> None:
        """No token follows: an incomplete character at the end is shown as such."""
        if self.stopped_by is None:
            self._take(self._decode_new())

    def _decode_new(self) -> str:
        before = self._decode(self._token_ids[self._context : self._done])
        return self._decode(self._token_ids[self._context :])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, skip_special_tokens=self._skip)

    def _take(self, new: str) -> None:
        self._context, self._done = self._done, len(self._token_ids)
        searched_from = len(self.text)
        self.text += new
        found = [
            (at, stop)
            for stop in self._stop
            if (at := self.text.find(stop, max(0, searched_from - len(stop) + 1))) >= 0
        ]
        if found:
            at, self.stopped_by = min(found)
            self.text = self.text[: at + len(self.stopped_by) if self.include_stop else at]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)

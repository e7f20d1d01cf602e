"""The text of one output of the Python API, growing token by token and ending at a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.text.stop_strings import StopStrings
from pdserve.text.tokenizer import Tokenizer


class TextStream:
    """`text` is what is certain so far; it never shrinks.

    Args:
        context: the prompt's tokens, which some tokenizers need for the first word.
        include_stop: whether the stop string that ends the text belongs to it.
        min_tokens: so many tokens come before a stop string may begin.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        context: Sequence[int] = (),
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        self._tokens_to_come = min_tokens
        self.include_stop = include_stop
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens, context)
        self._stops = StopStrings(stop, include_stop)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.hit

    def push(self, token_id: int) -> bool:
        """Add a token; True if a stop string is complete now, at which `text` then ends."""
        new = self._detokenizer.push(token_id)
        if self._tokens_to_come > 0:
            self._tokens_to_come -= 1
            self.text += new
            return False
        return self._take(new)

    def flush(self) -> None:
        """No token follows: show what was held back, an incomplete character as U+FFFD."""
        if self.stopped_by is None and not self._take(self._detokenizer.flush()):
            self.text += self._stops.flush()

    def _take(self, new: str) -> bool:
        text, stopped = self._stops.push(new)
        self.text += text
        return stopped

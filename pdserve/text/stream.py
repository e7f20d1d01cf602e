"""The text of one output, a few tokens at a time: detokenizer, stop strings and the place of each token in one.

Proxy and Python API make one `TextStream` for each output. Life cycle: `push` with what is new of the output, until
`stopped_by` names a stop string or no token follows; then `flush`, once. The result does not depend on how the tokens
are cut into calls.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pdserve.text.detokenizer import NoText
from pdserve.text.stop_strings import StopStrings
from pdserve.text.tokenizer import Tokenizer


class TextStream:
    """See the module.

    Args:
        tokenizer: of the model; None makes no text.
        context: the prompt's tokens, which some tokenizers need for the first word.
        skip_special_tokens: whether special tokens are left out of the text.
        shown: special tokens that are text nevertheless.
        stop: non-empty strings, the first of which ends the text before it.
        stop_ids: tokens that end the output; such a token is counted and is no text.
        include_stop: whether the stop string, or the stop token, that ends the output belongs to the text.
        min_tokens: the first so many tokens are never searched for stop strings, and all but the last of them end
            nothing.

    `num_tokens` counts the tokens up to the one that completes a stop string. `length` is the number of characters of
    all tokens so far, those held back included; a caller who puts a text in front adds that one's length. `stopped_by`
    is the stop string that ended the text, None before.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        context: Sequence[int] = (),
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
        stop: Sequence[str] = (),
        stop_ids: Collection[int] = frozenset(),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.num_tokens = 0
        self.length = 0
        self.stopped_by: str | None = None
        self._detokenizer = (
            NoText() if tokenizer is None else tokenizer.detokenizer(skip_special_tokens, context, shown)
        )
        self._stops = StopStrings(stop, include_stop) if stop else None
        self._hidden_ids = frozenset() if include_stop else stop_ids
        self._min_tokens = min_tokens

    def push(self, token_ids: Sequence[int], offsets: list[int] | None = None) -> str:
        """Add tokens, up to the one that completes a stop string.

        Args:
            offsets: gets the place of each added token's text, in characters from the start.

        Returns:
            The text that became certain. It is never taken back.
        """
        texts = []
        for token_id in token_ids:
            if offsets is not None:
                offsets.append(self.length)
            self.num_tokens += 1
            if token_id in self._hidden_ids and self.num_tokens >= self._min_tokens:
                text = ""
            else:
                text = self._detokenizer.push(token_id)
                self.length += len(text)
            if self._stops is None or self.num_tokens <= self._min_tokens:
                texts.append(text)
            else:
                texts.append(self._search(text))
                if self.stopped_by is not None:
                    break
        return "".join(texts)

    def flush(self) -> str:
        """What was held back, with U+FFFD for an incomplete character; that may complete a stop string. "" after
        one."""
        if self.stopped_by is not None:
            return ""
        text = self._detokenizer.flush()
        return text if self._stops is None else self._search(text) + self._stops.flush()

    def _search(self, text: str) -> str:
        """What of `text` is certain not to belong to a stop string."""
        assert self._stops is not None
        text, stopped = self._stops.push(text)
        if stopped:
            self.stopped_by = self._stops.hit
        return text

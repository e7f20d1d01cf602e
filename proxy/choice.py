"""One choice of an answer: turns a generation's tokens into pieces of text.

Owns detokenisation, stop strings, echo, and the positions of tokens in the text. A choice looks at each token once,
in order, so what it says does not depend on how the tokens arrived: streamed and whole answers are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pdserve.text.detokenizer import Detokenizer, NoText
from pdserve.text.stop_strings import StopStrings
from pdserve.text.tokenizer import Tokenizer
from proxy.generation import Generation


class Prompt(NamedTuple):
    """`text` is what the client wrote, None for a prompt of token ids."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How a choice's text is made. `discard_output` is for answers that consist of the prompt alone."""

    tokenizer: Tokenizer | None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    logprobs: bool = False
    discard_output: bool = False


class ScoredToken(NamedTuple):
    """A token with its log-probability (None for the first of a prompt), and where its text starts."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    text_offset: int


@dataclass(slots=True)
class Piece:
    """What is new of a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None


class Choice:
    """See the module.

    Args:
        index: its number in the answer.
        prompt: what was asked; needed for echo and for the text's context.
        generation: where the tokens come from.
    """

    def __init__(self, index: int, prompt: Prompt, generation: Generation, options: TextOptions) -> None:
        self.index = index
        self.prompt = prompt
        self.generation = generation
        self.finished = False
        self.num_tokens = 0
        self._options = options
        # The tokens that end the output, and so are not part of the text.
        self._end_ids = frozenset() if options.include_stop else generation.spec.stop_ids
        self._detokenizer = self._make_detokenizer()
        self._stops = StopStrings(options.stop, options.include_stop) if options.stop else None
        self._echo_due = options.echo
        self._text_length = 0

    @property
    def scores(self) -> bool:
        """Whether there are log-probabilities."""
        return self._options.logprobs

    @property
    def num_to_score(self) -> int:
        """For how many tokens the next `read` has log-probabilities, if there are any."""
        prompt = (self.generation.prompt_logprobs or ()) if self._echo_due else ()
        return len(self.generation.tokens) - self.num_tokens + len(prompt)

    def read(self) -> Piece | None:
        """What is new since the last call, None if nothing is. Ends the generation when a stop string is complete.

        Raises:
            PdserveError: the generation has failed.
        """
        generation = self.generation
        if generation.error is not None:
            raise generation.error
        if self.finished:
            return None
        tokens = generation.tokens[self.num_tokens :]
        if not tokens and not generation.done:
            return None
        piece = Piece()
        if self._echo_due:
            self._echo(piece)
        stopped = False if self._options.discard_output else self._append(piece, tokens)
        if stopped or generation.done:
            self.finished = True
            if stopped:
                generation.abort()
                piece.finish_reason = "stop"
            elif self._options.discard_output:
                piece.finish_reason = "length"
            else:
                piece.finish_reason = self._flush(piece) or generation.reason
        return piece

    def _append(self, piece: Piece, tokens: Sequence[int]) -> bool:
        """Add `tokens` to `piece`, up to the one that completes a stop string; True if there is such a one."""
        texts: list[str] = []
        stopped = False
        logprobs, end_ids = self._options.logprobs, self._end_ids
        for token_id in tokens:
            if logprobs:
                self._score(piece, token_id)
            self.num_tokens += 1
            text = "" if token_id in end_ids and self._may_end() else self._detokenizer.push(token_id)
            self._text_length += len(text)
            piece.token_ids.append(token_id)
            if self._stops is not None and self.num_tokens > self.generation.spec.sampling.min_tokens:
                text, stopped = self._stops.push(text)
            texts.append(text)
            if stopped:
                break
        piece.text += "".join(texts)
        return stopped

    def _flush(self, piece: Piece) -> str | None:
        """Add what was held back; "stop" if that completes a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            piece.text += rest
            return None
        text, stopped = self._stops.push(rest)
        piece.text += text + self._stops.flush()
        return "stop" if stopped else None

    def _may_end(self) -> bool:
        return self.num_tokens >= self.generation.spec.sampling.min_tokens

    def _score(self, piece: Piece, token_id: int) -> None:
        logprobs = self.generation.logprobs
        if self.num_tokens < len(logprobs):
            found = logprobs[self.num_tokens]
            piece.scored.append(ScoredToken(token_id, found.logprob, found.top, self._text_length))

    def _echo(self, piece: Piece) -> None:
        self._echo_due = False
        text = piece.text = self._prompt_text()
        offsets = self._prompt_offsets(text) if self._options.logprobs else []
        for entry, token_id, offset in zip(
            self.generation.prompt_logprobs or (), self.prompt.token_ids, offsets, strict=False
        ):
            logprob, top = (None, []) if entry is None else (entry.logprob, entry.top)
            piece.scored.append(ScoredToken(token_id, logprob, top, offset))
        self._text_length = len(text)

    def _prompt_text(self) -> str:
        tokenizer, prompt = self._options.tokenizer, self.prompt
        if tokenizer is None:
            return ""
        return tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

    def _prompt_offsets(self, text: str) -> list[int]:
        """Where each token of the prompt starts in its `text`."""
        tokenizer = self._options.tokenizer
        if tokenizer is None:
            return [0] * len(self.prompt.token_ids)
        offsets, position = [], 0
        detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
        for token_id in self.prompt.token_ids:
            offsets.append(position)
            new = detokenizer.push(token_id)
            # A token that the tokenizer put in front (BOS) has no place in the client's text.
            if text.startswith(new, position) or not tokenizer.is_special(token_id):
                position = min(position + len(new), len(text))
        return offsets

    def _make_detokenizer(self) -> Detokenizer:
        options = self._options
        if options.tokenizer is None:
            return NoText()
        return options.tokenizer.detokenizer(options.skip_special_tokens, self.prompt.token_ids)

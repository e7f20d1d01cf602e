"""One choice of an answer: turns a generation's tokens into pieces of text.

`routes.answer` reads it, piece by piece. Owns how far the generation has been read, the log-probabilities and the
prompt's echo; a `TextStream` makes the text. A choice reads each token once, in order, so its text does not depend on
how the tokens arrived: a streamed answer is the same as a whole one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pdserve.text.stream import TextStream
from pdserve.text.tokenizer import Tokenizer
from proxy.generation import Generation
from proxy.plan import Plan, Prompt
from proxy.schemas.fields import EndReason


class ScoredToken(NamedTuple):
    """A token with its log-probability (None for the first of a prompt), and where its text starts."""

    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    text_offset: int


@dataclass(slots=True)
class Piece:
    """What is new of a choice. `finish_reason` is None while more may come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: EndReason | None = None


class Choice:
    """See the module.

    Args:
        index: its number in the answer.
        prompt: what was asked; needed for echo and for the text's context.
        generation: where the tokens come from.
        tokenizer: of the model; without one there is no text.
    """

    def __init__(
        self, index: int, prompt: Prompt, generation: Generation, tokenizer: Tokenizer | None, plan: Plan
    ) -> None:
        sampling = generation.spec.sampling
        self.index = index
        self.prompt = prompt
        self.generation = generation
        self.finished = False
        self.scores = sampling.logprobs is not None
        self._tokenizer = tokenizer
        self._discard_output = plan.discard_output
        self._echo_due = plan.echo
        self._text = TextStream(
            tokenizer,
            context=prompt.token_ids,
            skip_special_tokens=plan.skip_special_tokens,
            shown=plan.shown_special_ids,
            stop=plan.stop,
            stop_ids=generation.spec.stop_ids,
            include_stop=plan.include_stop,
            min_tokens=sampling.min_tokens,
        )

    @property
    def num_tokens(self) -> int:
        """How many output tokens were read."""
        return self._text.num_tokens

    @property
    def num_to_score(self) -> int:
        """For how many tokens the next `read` has log-probabilities, if there are any."""
        output = self.generation.output
        prompt = (output.prompt_logprobs or ()) if self._echo_due else ()
        return len(output.tokens) - self.num_tokens + len(prompt)

    def read(self) -> Piece | None:
        """What is new since the last call, None if nothing is. Ends the generation when a stop string is complete.

        Raises:
            PdserveError: the generation has failed.
        """
        generation, text = self.generation, self._text
        if generation.error is not None:
            raise generation.error
        known = text.num_tokens
        tokens = generation.output.tokens[known:]
        if self.finished or not (tokens or generation.done):
            return None
        piece = Piece("", tokens, [])
        if self._echo_due:
            self._echo(piece)
        if self._discard_output:
            piece.token_ids = []
        elif self.scores:
            self._push_scored(piece, known)
        else:
            piece.text += text.push(tokens)
        if generation.done or text.stopped_by is not None:
            self._end(piece, known)
        return piece

    def _push_scored(self, piece: Piece, known: int) -> None:
        """Add the text of the piece's tokens, and their log-probabilities; `known` tokens came before them."""
        offsets: list[int] = []
        piece.text += self._text.push(piece.token_ids, offsets)
        found = self.generation.output.logprobs[known : known + len(offsets)]
        for token_id, each, offset in zip(piece.token_ids, found, offsets, strict=False):
            piece.scored.append(ScoredToken(token_id, each.logprob, each.top, offset))

    def _end(self, piece: Piece, known: int) -> None:
        """Say why the choice ended, and drop tokens beyond a stop string."""
        self.finished = True
        text = self._text
        if self._discard_output:
            piece.finish_reason = "length"
            return
        if text.stopped_by is not None:
            self.generation.abort()
        piece.text += text.flush()
        piece.finish_reason = self.generation.reason if text.stopped_by is None else "stop"
        del piece.token_ids[text.num_tokens - known :]

    def _echo(self, piece: Piece) -> None:
        self._echo_due = False
        text = piece.text = self._prompt_text()
        self._text.length = len(text)
        offsets: Sequence[int] = ()
        if self.scores:
            token_ids = self.prompt.token_ids
            offsets = [0] * len(token_ids) if self._tokenizer is None else self._tokenizer.offsets(token_ids, text)
        for entry, token_id, offset in zip(
            self.generation.output.prompt_logprobs or (), self.prompt.token_ids, offsets, strict=False
        ):
            logprob, top = (None, []) if entry is None else (entry.logprob, entry.top)
            piece.scored.append(ScoredToken(token_id, logprob, top, offset))

    def _prompt_text(self) -> str:
        tokenizer, prompt = self._tokenizer, self.prompt
        if tokenizer is None:
            return ""
        return tokenizer.decode(prompt.token_ids) if prompt.text is None else prompt.text

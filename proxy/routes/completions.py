"""`POST /v1/completions`: what a request asks for, and its answers as JSON."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET

from pdserve.errors import PdserveError, RequestError
from pdserve.text.tokenizer import Tokenizer
from proxy.choice import Choice, Piece, ScoredToken
from proxy.model import ServedModel
from proxy.plan import Plan
from proxy.routes.events import DONE, HOLE, EventTemplate, error_event, event
from proxy.sampling import to_sampling
from proxy.schemas.completions import Completion, CompletionChoice, CompletionLogprobs, CompletionRequest
from proxy.schemas.usage import UsageInfo

_DEFAULT_MAX_TOKENS = 16


def plan_completion(body: CompletionRequest, _: ServedModel) -> Plan:
    """Raises RequestError: no output is asked for, nor an echo."""
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: 0 is only allowed with echo", "max_tokens")
    prompt_logprobs = body.logprobs if body.echo else None
    return Plan(
        model=body.model,
        prompts=body.prompt,
        sampling=functools.partial(to_sampling, body, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs),
        num_choices=body.n or 1,
        seed=body.seed,
        max_tokens=_DEFAULT_MAX_TOKENS if body.max_tokens is None else max(1, body.max_tokens),
        cache_salt=body.cache_salt or "",
        add_special_tokens=body.add_special_tokens is not False,
        stream=bool(body.stream),
        stop=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        echo=bool(body.echo),
        discard_output=body.max_tokens == 0,
    )


class CompletionFormatter:
    """Text completions as JSON."""

    def __init__(self, answer_id: str, model: ServedModel, body: CompletionRequest) -> None:
        self._id = answer_id
        self._model = model
        self._body = body
        self._created = int(time.time())
        self._is_plain = body.logprobs is None and not body.return_token_ids
        self._frame = EventTemplate(self._completion([HOLE]))
        self._plain: dict[int, EventTemplate] = {}

    def whole(self, choices: Sequence[Any], usage: UsageInfo) -> Completion:
        return self._completion(choices, usage)

    def choice(self, choice: Choice, piece: Piece) -> CompletionChoice:
        return self._choice(choice, piece, is_first=True)

    def news(self, choice: Choice, piece: Piece) -> bytes:
        plain = self._plain.get(choice.index)
        if plain is None:
            template = CompletionChoice(choice.index, HOLE, None, None)
            self._plain[choice.index] = EventTemplate(self._completion([template]))
        elif self._is_plain and piece.finish_reason is None:
            return plain.fill(piece.text)
        return self._frame.fill(self._choice(choice, piece, is_first=plain is None))

    def end(self, usage: UsageInfo) -> bytes:
        return event(self._completion([], usage)) + DONE if self._body.wants_usage_chunk else DONE

    def error(self, error: PdserveError) -> bytes:
        return error_event(error)

    def _choice(self, choice: Choice, piece: Piece, *, is_first: bool) -> CompletionChoice:
        result = CompletionChoice(choice.index, piece.text, self._logprobs(piece.scored), piece.finish_reason)
        if self._body.return_token_ids:
            result.token_ids = piece.token_ids
            if is_first:
                result.prompt_token_ids = choice.prompt.token_ids
        return result

    def _completion(self, choices: Sequence[CompletionChoice], usage: UsageInfo | None = None) -> Completion:
        """An answer, or without `usage` an event; such says that its counts are still to come, if they are."""
        counts = UNSET if usage is None and not self._body.wants_usage_chunk else usage
        return Completion(self._id, "text_completion", self._created, self._model.name, choices, counts)

    def _logprobs(self, scored: Sequence[ScoredToken]) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        tokenizer = self._model.tokenizer
        return CompletionLogprobs(
            tokens=[token_text(tokenizer, token.token_id) for token in scored],
            token_logprobs=[token.logprob for token in scored],
            top_logprobs=[_alternatives(tokenizer, token) for token in scored],
            text_offset=[token.text_offset for token in scored],
        )


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """One token as text: its bytes, written out, if they are no text alone; its id if there is no tokenizer."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _alternatives(tokenizer: Tokenizer | None, token: ScoredToken) -> dict[str, float] | None:
    """The best tokens and the one that was chosen; None where there is no choice (a prompt's first)."""
    if token.logprob is None:
        return None
    ranked = (
        token.top
        if any(token.token_id == other for other, _ in token.top)
        else [
            *token.top,
            (token.token_id, token.logprob),
        ]
    )
    found: dict[str, float] = {}
    for token_id, logprob in ranked:
        found.setdefault(token_text(tokenizer, token_id), logprob)
    return found

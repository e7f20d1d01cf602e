"""`POST /tokenize` and `POST /detokenize`: what the model's tokenizer makes of a text, and of tokens.

Both are admitted as requests that generate are: a place, bytes of the body, tokens; and work on what is large is done
in the same threads. No worker has to do with it. A text may be longer than the model's context, so that clients learn
by how much, but not without end: what is made of each token holds the interpreter for a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
from aiohttp import web

from pdserve.errors import (
    BodyTooLarge,
    ContextLengthExceeded,
    Draining,
    LimitExceeded,
    ModelNotFound,
    NotReady,
    Overloaded,
    RequestError,
    RequestTimeout,
    UnsupportedMediaType,
)
from pdserve.http import Handler
from pdserve.openapi import JSON, Operation
from pdserve.text.tokenizer import Tokenizer
from proxy.admission import Visit
from proxy.intake import read_body, rendered
from proxy.plan import Conversation
from proxy.schemas.tokens import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest
from proxy.service import Service

_MOST_CONTEXTS = 4
"""What has more tokens than so many of the model's contexts is refused."""
_INLINE_TOKENS = 1024
"""So many are written, or made text, in place."""
_ENCODED_AT_ONCE = 16 * 1024
"""msgspec holds the interpreter for a whole call, which is less than a millisecond for so many."""
_BYTES_PER_TOKEN = 4

_ERRORS = (
    *(RequestError, LimitExceeded, ModelNotFound, RequestTimeout, BodyTooLarge, UnsupportedMediaType),
    *(Overloaded, NotReady, Draining),
)


class Tokens:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[tuple[Operation, Handler]]:
        """What is served, and how."""
        made, text = {JSON: Tokenized}, {JSON: Detokenized}
        tokenize = Operation("POST", "/tokenize", "A text as tokens", made, body=TokenizeRequest, errors=_ERRORS)
        detokenize = Operation("POST", "/detokenize", "Tokens as text", text, body=DetokenizeRequest, errors=_ERRORS)
        return [(tokenize, self.tokenize), (detokenize, self.detokenize)]

    async def tokenize(self, request: web.Request) -> web.Response:
        with self._service.admission.visit() as visit:
            body = await read_body(self._service, request, TokenizeRequest, visit)
            tokenizer = self._enter(visit, body.model, body.param)
            longest = self._service.fleet.max_seq_len()
            token_ids = await self._token_ids(body, tokenizer, visit)
            self._hold(visit, len(token_ids), body.param)
            spelled = tokenizer if body.return_token_strs else None
            return await self._answer(len(token_ids), lambda: _tokenized(token_ids, longest, spelled))

    async def detokenize(self, request: web.Request) -> web.Response:
        with self._service.admission.visit() as visit:
            body = await read_body(self._service, request, DetokenizeRequest, visit)
            tokenizer = self._enter(visit, body.model, "tokens")
            self._hold(visit, len(body.tokens), "tokens")
            self._service.model.check_vocabulary(body.tokens, "tokens")
            return await self._answer(
                len(body.tokens), lambda: msgspec.json.encode(Detokenized(tokenizer.decode(body.tokens)))
            )

    def _enter(self, visit: Visit, model: str | None, param: str) -> Tokenizer:
        """A place for a request that has the text in its field `param`. Clients need not name a model."""
        if model is not None:
            self._service.model.check_name(model)
        visit.take(1, param)
        return self._service.model.need_tokenizer(param)

    async def _token_ids(self, body: TokenizeRequest, tokenizer: Tokenizer, visit: Visit) -> list[int]:
        text, add_special_tokens = body.prompt, body.add_special_tokens is not False
        if text is None:
            conversation, add_special_tokens = _conversation(body), bool(body.add_special_tokens)
            text = await rendered(self._service, conversation, visit.body_bytes, body.param)
        work = self._service.text_work
        try:
            (token_ids,) = await work.encode(tokenizer, [text], add_special_tokens, self._most(), body.param)
        except ContextLengthExceeded:
            raise self._too_many(body.param) from None
        return token_ids

    def _hold(self, visit: Visit, num_tokens: int, param: str) -> None:
        """Count so many tokens. Raises LimitExceeded or Overloaded: they are too many, ever or now."""
        if num_tokens > self._most():
            raise self._too_many(param)
        visit.hold_tokens(num_tokens, param)

    def _most(self) -> int:
        """How many tokens a text may have. Raises NotReady: without workers the model's context is not known."""
        return _MOST_CONTEXTS * self._service.fleet.max_seq_len()

    def _too_many(self, param: str) -> LimitExceeded:
        return LimitExceeded(f"{param}: more than {self._most()} tokens, {_MOST_CONTEXTS} times max_seq_len", param)

    async def _answer(self, num_tokens: int, encode: Callable[[], bytes]) -> web.Response:
        """What `encode` makes of so many tokens."""
        if num_tokens <= _INLINE_TOKENS:
            body = encode()
        else:
            body = await self._service.text_work.run(num_tokens * _BYTES_PER_TOKEN, encode)
        return web.Response(body=body, content_type=JSON)


def _conversation(body: TokenizeRequest) -> Conversation:
    """The one that `body` has."""
    messages = body.messages or []
    asks = {} if body.add_generation_prompt is None else {"add_generation_prompt": body.add_generation_prompt}
    variables = {**(body.chat_template_kwargs or {}), **asks}
    return Conversation(len(messages), lambda: [message.for_template() for message in messages], variables)


def _tokenized(token_ids: Sequence[int], longest: int, spelled: Tokenizer | None) -> bytes:
    """The answer for `token_ids`, with their text if `spelled` is there to tell it."""
    answer = Tokenized(len(token_ids), longest, _in_parts(token_ids))
    if spelled is not None:
        answer.token_strs = _in_parts(spelled.pieces(token_ids))
    return msgspec.json.encode(answer)


def _in_parts(values: Sequence[object]) -> Any:
    """`values` as a list in JSON (`msgspec.Raw`), written part by part."""
    starts = range(0, len(values), _ENCODED_AT_ONCE)
    parts = [msgspec.json.encode(values[start : start + _ENCODED_AT_ONCE])[1:-1] for start in starts]
    return msgspec.Raw(b"[" + b",".join(parts) + b"]")

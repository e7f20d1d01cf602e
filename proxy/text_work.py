"""Work on large texts off the event loop: bodies to models, messages to prompts, prompts to tokens.

Small requests are served in place, which is cheaper than a thread. The rest runs in a few threads, and what is really
large in one thread of its own: such requests wait for each other, never in front of anybody else, and what the
tokenizer takes meanwhile (80 bytes for each byte of text) is taken once. How much may wait is `admission`'s to say.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pdserve.errors import ContextLengthExceeded
from pdserve.http import Model, parse_body
from pdserve.text.tokenizer import Tokenizer
from proxy import large_json

T = TypeVar("T")

_INLINE_CHARACTERS = 4096
_INLINE_BODY_BYTES = 64 * 1024
_BATCH_CHARACTERS = 64 * 1024
_LARGE = 256 * 1024
"""Characters or bytes from which work goes to the thread for large work."""
_PROBE_CHARACTERS_PER_TOKEN = 8
"""Ordinary text has 3 to 5; so the first 8 for each token of the limit show whether a long text is beyond it."""


class TextWork:
    """The threads. They start when they are needed; `close` ends them."""

    def __init__(self) -> None:
        self._small = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="text")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="large-text")

    def close(self) -> None:
        self._small.shutdown(wait=False, cancel_futures=True)
        self._large.shutdown(wait=False, cancel_futures=True)

    async def parse(self, raw: bytes, model: type[Model]) -> Model:
        """`raw`, a body of JSON, as `model`; raises as `parse_body` does."""
        if len(raw) <= _INLINE_BODY_BYTES:
            return parse_body(raw, model)
        return await self.run(len(raw), lambda: parse_body(raw, model, large_json.decode))

    async def encode(
        self, tokenizer: Tokenizer, texts: Sequence[str], add_special_tokens: bool, max_tokens: int, param: str
    ) -> list[list[int]]:
        """Each of `texts` as token ids.

        Raises:
            ContextLengthExceeded: one of them certainly has more than `max_tokens` tokens. Others may still have.
        """
        longest = max(map(len, texts))
        if longest > max_tokens:
            _check_characters(tokenizer, longest, max_tokens, param)
        if sum(map(len, texts)) <= _INLINE_CHARACTERS:
            return tokenizer.encode_batch(texts, add_special_tokens)
        if longest <= _BATCH_CHARACTERS:
            return await self.run(0, lambda: tokenizer.encode_batch(texts, add_special_tokens))
        return [
            await self.run(len(text), _long_encoder(tokenizer, text, add_special_tokens, max_tokens, param))
            for text in texts
        ]

    def run(self, size: int, work: Callable[[], T]) -> Awaitable[T]:
        """`work` in a thread; `size` says whether it is large."""
        large = size > _LARGE
        call = (lambda: _and_trim(work)) if large else work
        return asyncio.get_running_loop().run_in_executor(self._large if large else self._small, call)


def batches(texts: Sequence[str]) -> list[Sequence[str]]:
    """`texts` in order, in parts that take a thread some 10 ms; a text longer than that is a part of its own."""
    found: list[Sequence[str]] = []
    start, size = 0, 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > _BATCH_CHARACTERS:
            found.append(texts[start:index])
            start, size = index, 0
        size += len(text)
    return [*found, texts[start:]] if start < len(texts) else found


def _check_characters(tokenizer: Tokenizer, num_characters: int, max_tokens: int, param: str) -> None:
    longest_token = tokenizer.max_characters_per_token
    if longest_token is not None and num_characters > max_tokens * longest_token:
        raise _too_long(num_characters, max_tokens, param)


def _long_encoder(
    tokenizer: Tokenizer, text: str, add_special_tokens: bool, max_tokens: int, param: str
) -> Callable[[], list[int]]:
    def encode() -> list[int]:
        probe = max(_BATCH_CHARACTERS, max_tokens * _PROBE_CHARACTERS_PER_TOKEN)
        # A text that is cut has a few tokens more or less there than it has as a whole.
        if len(text) > probe and tokenizer.count(text[:probe]) > max_tokens + max_tokens // 16 + 16:
            raise _too_long(len(text), max_tokens, param)
        return tokenizer.encode_now(text, add_special_tokens)

    return encode


def _too_long(num_characters: int, max_tokens: int, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"{param}: a prompt of {num_characters} characters has more tokens than max_seq_len, which for prompt and "
        f"output is {max_tokens}",
        param,
    )


def _and_trim(work: Callable[[], T]) -> T:
    """`work`, after which the C library gives back what it freed: else it keeps hundreds of megabytes a thread."""
    try:
        return work()
    finally:
        if _malloc_trim is not None:
            _malloc_trim(0)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
"""glibc's; other C libraries have none."""

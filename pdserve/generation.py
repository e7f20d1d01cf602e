"""The outputs of the Python API: what a prompt has produced so far, and the handle to wait for more.

Owns the collecting of one prompt's `n` outputs. The engine's thread fills it in; any thread, or one event loop, waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pdserve.errors import ErrorInfo, from_info
from pdserve.protocol import Finished, FinishReason, Key, TokenDelta, TokenLogprob
from pdserve.text.stream import TextStream


@dataclass(frozen=True, slots=True)
class Logprob:
    """`rank` counts from 1, the most probable; None if it is below all alternatives that were asked for."""

    logprob: float
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of the `n` outputs. `finish_reason` is None while it grows; `stop_reason` is the stop string that ended it.

    `logprobs` holds an entry a token, by token id; `prompt_logprobs` likewise, None for the first.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    cumulative_logprob: float | None = None
    stop_reason: str | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A prompt and its outputs. `prompt` is None where token ids were given."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool


@dataclass(slots=True)
class _Output:
    """A `CompletionOutput` in the making."""

    stream: TextStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finish_reason: FinishReason | None = None
    error: ErrorInfo | None = None

    def add(self, delta: TokenDelta) -> bool:
        """Take new tokens in; True if a stop string ends the output among them."""
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = [None if each is None else _by_token(each) for each in delta.prompt_logprobs]
        known = self.stream.num_tokens
        self.text += self.stream.push(delta.token_ids)
        taken = self.stream.num_tokens - known
        self.token_ids += delta.token_ids[:taken]
        for entry in (delta.logprobs or ())[:taken]:
            self.logprobs.append(_by_token(entry))
            self.cumulative_logprob += entry.logprob
        if self.stream.stopped_by is None:
            return False
        self.finish_reason = "stop"
        return True

    def end(self, finished: Finished) -> None:
        if finished.error is None:
            self.text += self.stream.flush()
        self.error = finished.error
        self.finish_reason = finished.reason if self.stream.stopped_by is None else "stop"

    def snapshot(self, index: int) -> CompletionOutput:
        return CompletionOutput(
            index=index,
            text=self.text,
            token_ids=list(self.token_ids),
            logprobs=list(self.logprobs) or None,
            finish_reason=self.finish_reason,
            cumulative_logprob=self.cumulative_logprob if self.logprobs else None,
            stop_reason=self.stream.stopped_by,
            prompt_logprobs=self.prompt_logprobs,
        )


class Generation:
    """One prompt on its way. Iterate over it with `async for`, await it, or wait for `result()`.

    Args:
        abort: ends a request of the engine.
        make_stream: makes the text of one output.
    """

    def __init__(
        self,
        prompt: str | None,
        prompt_token_ids: list[int],
        keys: Sequence[Key],
        abort: Callable[[Key], None],
        make_stream: Callable[[], TextStream],
    ) -> None:
        self._prompt = prompt
        self._prompt_token_ids = prompt_token_ids
        self._keys = keys
        self._abort = abort
        self._outputs = [_Output(make_stream()) for _ in keys]
        self._changed = threading.Condition()
        self._version = 0
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def n(self) -> int:
        return len(self._keys)

    def listener(self, index: int) -> Callable[[TokenDelta | None, Finished | None], None]:
        """The listener for output `index`: the engine's thread calls it with each delta, and with the end."""

        def take(delta: TokenDelta | None, finished: Finished | None) -> None:
            try:
                with self._changed:
                    self._take(index, delta, finished)
            finally:
                self._notify()

        return take

    def abort(self) -> None:
        """End all outputs early; they keep what they have, with `finish_reason` "abort"."""
        for key in self._keys:
            self._abort(key)

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Wait for all outputs.

        Raises:
            TimeoutError: after `timeout_s`; the request goes on.
            PdserveError: the engine refused or failed the request.
        """
        with self._changed:
            if not self._changed.wait_for(self._is_finished, timeout_s):
                raise TimeoutError(f"not finished after {timeout_s} s")
            return self._snapshot()

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self._last().__await__()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        """What there is, whenever there is more; `finished` with the last. Leaving the loop early aborts."""
        event = asyncio.Event()
        with self._changed:
            self._waiter = (asyncio.get_running_loop(), event)
        seen = 0
        try:
            while True:
                with self._changed:
                    event.clear()
                    output = self._snapshot() if self._version > seen else None
                    seen = self._version
                if output is not None:
                    yield output
                    if output.finished:
                        return
                else:
                    await event.wait()
        finally:
            self._waiter = None
            if not self._is_finished():
                self.abort()

    async def _last(self) -> RequestOutput:
        async for output in self:
            if output.finished:
                return output
        raise AssertionError("a generation always finishes")

    def _take(self, index: int, delta: TokenDelta | None, finished: Finished | None) -> None:
        output = self._outputs[index]
        if output.finish_reason is not None:
            return  # after a stop string: the engine had not heard of it yet
        if delta is not None and output.add(delta):
            self._abort(self._keys[index])
        elif finished is not None:
            output.end(finished)
            if finished.error is not None:
                self.abort()

    def _notify(self) -> None:
        with self._changed:
            self._version += 1
            self._changed.notify_all()
            waiter = self._waiter
        if waiter is not None:
            # The loop may be closed: then nobody waits there any more.
            with contextlib.suppress(RuntimeError):
                waiter[0].call_soon_threadsafe(waiter[1].set)

    def _is_finished(self) -> bool:
        return all(output.finish_reason is not None for output in self._outputs)

    def _snapshot(self) -> RequestOutput:
        for output in self._outputs:
            if output.error is not None:
                raise from_info(output.error)
        outputs = [output.snapshot(index) for index, output in enumerate(self._outputs)]
        return RequestOutput(self._prompt, self._prompt_token_ids, outputs, self._is_finished())


def _by_token(entry: TokenLogprob) -> dict[int, Logprob]:
    ranked = {token_id: Logprob(logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)}
    return {entry.token_id: ranked.get(entry.token_id, Logprob(entry.logprob)), **ranked}

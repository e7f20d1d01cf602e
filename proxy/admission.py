"""Limits what the proxy takes on at once: choices, bytes of bodies, prompt tokens. Refuses requests while it drains.

An endpoint opens a `Visit` for each request. The visit counts what the request holds, and gives all of it back when it
ends. Each sum has a limit in `ProxyConfig`: what exceeds it now is refused with 429, what could never fit with 400. A
place is taken only once the whole body is there and parsed, so that clients who send slowly keep nobody out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from pdserve.config import ProxyConfig
from pdserve.errors import Draining, LimitExceeded, Overloaded

SMALL_BODY_BYTES = 64 * 1024
"""A quarter of the bytes for bodies is kept for requests that are no larger than this."""


class Admission:
    """See the module. `on_change` is called with the number of open choices."""

    def __init__(self, limits: ProxyConfig, on_change: Callable[[int], None]) -> None:
        self.draining = False
        self._limits = limits
        self._on_change = on_change
        self._choices = 0
        self._body_bytes = 0
        self._prompt_tokens = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextlib.contextmanager
    def visit(self) -> Iterator[Visit]:
        """Open a visit for one request, and close it with the block.

        Raises:
            Overloaded: all places are taken. No place is taken yet: that is `Visit.take`'s.
            Draining: this proxy takes no more requests.
        """
        self._check(1, None)
        visit = Visit(self)
        try:
            yield visit
        finally:
            self._leave(visit)

    def check(self) -> None:
        """Raises what a request that came now would be refused with, however small: Overloaded or Draining."""
        self._check(1, None)
        if self._body_bytes >= self._limits.max_total_body_bytes:
            raise Overloaded(f"the bodies of open requests fill {self._body_bytes} bytes, as many as may be held")
        if self._prompt_tokens >= self._limits.max_total_prompt_tokens:
            raise Overloaded(f"open requests have {self._prompt_tokens} prompt tokens, as many as may be open")

    @property
    def open_choices(self) -> int:
        return self._choices

    async def wait_idle(self) -> None:
        """Return when no choice is open."""
        await self._idle.wait()

    def _check(self, choices: int, param: str | None) -> None:
        limit = self._limits.max_concurrent_requests
        if self.draining:
            raise Draining("this proxy is shutting down")
        if choices > limit:
            raise LimitExceeded(f"{param}: {choices} choices asked; max_concurrent_requests is {limit}", param)
        if self._choices + choices > limit:
            raise Overloaded(f"{self._choices} of {limit} requests are open already")

    def _take(self, visit: Visit, choices: int, param: str) -> None:
        self._check(choices, param)
        visit.choices += choices
        self._choices += choices
        self._idle.clear()
        self._on_change(self._choices)

    def _hold_bytes(self, visit: Visit, num_bytes: int) -> None:
        visit.body_bytes += num_bytes
        self._body_bytes += num_bytes
        limit = self._limits.max_total_body_bytes
        if self._body_bytes > (limit if visit.body_bytes <= SMALL_BODY_BYTES else limit - limit // 4):
            raise Overloaded(f"the bodies of open requests fill {limit} bytes, as many as may be held")

    def _hold_tokens(self, visit: Visit, num_tokens: int, param: str) -> None:
        visit.prompt_tokens += num_tokens
        self._prompt_tokens += num_tokens
        limit = self._limits.max_total_prompt_tokens
        if visit.prompt_tokens > limit:
            raise LimitExceeded(
                f"{param}: all choices together have more prompt tokens than max_total_prompt_tokens, {limit}", param
            )
        if self._prompt_tokens > limit:
            raise Overloaded(f"open requests have {limit} prompt tokens, as many as may be open")

    def _leave(self, visit: Visit) -> None:
        self._body_bytes -= visit.body_bytes
        self._prompt_tokens -= visit.prompt_tokens
        if visit.choices:
            self._choices -= visit.choices
            self._on_change(self._choices)
            if self._choices == 0:
                self._idle.set()


class Visit:
    """What one request holds. Its methods raise `Overloaded`, or `LimitExceeded` for what could never fit."""

    __slots__ = ("_admission", "body_bytes", "choices", "prompt_tokens")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.choices = 0
        self.body_bytes = 0
        self.prompt_tokens = 0

    def take(self, choices: int, param: str) -> None:
        """Take places for `choices`. `param` is the field to name in errors. Also raises `Draining`."""
        self._admission._take(self, choices, param)

    def hold_bytes(self, num_bytes: int) -> None:
        """Count `num_bytes` more of the body."""
        self._admission._hold_bytes(self, num_bytes)

    def hold_tokens(self, num_tokens: int, param: str) -> None:
        """Count `num_tokens` more prompt tokens, each once for every choice. `param` is the field to name in errors."""
        self._admission._hold_tokens(self, num_tokens, param)

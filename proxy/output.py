"""What the workers have said of one choice's output, over all its attempts.

The context worker's first token and the generation worker's tokens come over different sockets, so either may be
first; a retry may repeat what is known already. What counts is each delta's `start`.
"""

from __future__ import annotations

from pdserve.protocol import TokenDelta, TokenLogprob


class Output:
    """Tokens without gaps. A delta that starts beyond the last known token waits until the gap is closed.

    Attributes:
        tokens: the output from its start.
        logprobs: an entry for each of `tokens`; empty if none were asked for.
        prompt_logprobs: an entry for each token of the prompt; None if none were asked for.
        cached_tokens: tokens of the prompt that a worker had in its cache.
        received_at: when the oldest delta came that the reader has not written yet (`time.perf_counter()`). The reader
            sets it to None.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob | None] | None = None
        self.cached_tokens = 0
        self.received_at: float | None = None
        self._early: dict[int, TokenDelta] = {}

    @property
    def has_gap(self) -> bool:
        return bool(self._early)

    def add(self, delta: TokenDelta) -> None:
        """Take `delta` over; tokens that are known already are dropped."""
        if delta.prompt_logprobs is not None and self.prompt_logprobs is None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.start > len(self.tokens):
            known = self._early.get(delta.start)
            if known is None or len(known.token_ids) < len(delta.token_ids):
                self._early[delta.start] = delta
            return
        self._append(delta)
        while self._early and (start := min(self._early)) <= len(self.tokens):
            self._append(self._early.pop(start))

    def forget_early(self) -> None:
        """Drop what lies beyond a gap: the attempt it came from is over, and the next one repeats it."""
        self._early.clear()

    def _append(self, delta: TokenDelta) -> None:
        known = len(self.tokens) - delta.start
        self.tokens += delta.token_ids[known:] if known else delta.token_ids
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs[known:]

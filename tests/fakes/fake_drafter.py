"""A drafter that knows what the fake model will say, and errs as it is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pdserve.protocol import EngineLimits, Sampling
from tests.fakes.fake_runner import SMALL_LIMITS, chains_of, extend_chain, pick_token


class FakeDrafter:
    """Implements `Drafter` for requests in `known`, each a prompt with its sampling.

    Of `n` drafts the first `num_right(n)` are what the model says, beyond the end of the request if need be; the others
    are not.
    """

    def __init__(self, num_right: Callable[[int], int], limits: EngineLimits = SMALL_LIMITS) -> None:
        self.known: list[tuple[list[int], Sampling]] = []
        self.num_right = num_right
        self.num_proposed = 0
        self._limits = limits

    def propose(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        assert max_drafts > 0
        chains = chains_of(token_ids)
        for prompt, sampling in self.known:
            num_output = len(token_ids) - len(prompt)
            if num_output < 1 or token_ids[: len(prompt)] != prompt:
                continue
            if pick_token(chains[-2], num_output - 1, sampling, self._limits) == token_ids[-1]:
                return self._guess(chains[-1], num_output, sampling, max_drafts)
        return []

    def _guess(self, chain: int, num_output: int, sampling: Sampling, max_drafts: int) -> list[int]:
        drafts: list[int] = []
        num_right = self.num_right(max_drafts)
        for at in range(max_drafts):
            token_id = pick_token(chain, num_output + at, sampling, self._limits)
            drafts.append(token_id if at < num_right else (token_id + 1) % self._limits.vocab_size)
            chain = extend_chain(chain, token_id)
        self.num_proposed += len(drafts)
        return drafts

"""Picks tokens from logits.

The pipeline of a row: penalties (`penalties`), `min_tokens`, then temperature, filters and draw, which are
`pd_kernels.sampling`. The draw takes a number that depends on (seed, position) only: equal logits give equal tokens,
whatever else is in the batch and whichever worker computes it. Only the penalties' table is kept between calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels import sampling
from pdserve.engine.layers.step_input import upload
from pdserve.engine.run.penalties import Penalties, has_penalties
from pdserve.protocol import Sampling, TokenLogprob

Array = np.ndarray[Any, Any]

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A row to sample: how, and the history that penalties, `min_tokens` and the draw depend on.

    The lists are the request's own, the same at every step, and only ever grow. `num_pending` output tokens exist on
    the device but are not yet in `output_ids`; a request with penalties never has any.
    """

    sampling: Sampling
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    num_pending: int = 0

    @property
    def num_output(self) -> int:
        return len(self.output_ids) + self.num_pending

    @property
    def position(self) -> int:
        """Where in the sequence the token to sample will stand."""
        return len(self.prompt_ids) + self.num_output

    @property
    def is_argmax(self) -> bool:
        """Whether the token is simply the most probable one."""
        sampling = self.sampling
        return sampling.temperature <= 0 and not has_penalties(sampling) and self.num_output >= sampling.min_tokens


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of `ids` [n] in `values` [n], and the best alternatives in `top_ids`, `top_values` [n, k]."""

    ids: Tensor
    values: Tensor
    top_ids: Tensor
    top_values: Tensor

    def map(self, move: Callable[[Tensor], Tensor]) -> Logprobs:
        """The same with each tensor passed through `move`."""
        return Logprobs(move(self.ids), move(self.values), move(self.top_ids), move(self.top_values))

    def entries(self, num_top: Sequence[int]) -> list[TokenLogprob]:
        """As messages, with `num_top[i]` alternatives for row i; the tensors must be on the host."""
        rows = zip(
            self.ids.tolist(), self.values.tolist(), self.top_ids.tolist(), self.top_values.tolist(), strict=True
        )
        return [
            TokenLogprob(token, value, list(zip(top_ids[:n], top_values[:n], strict=True)))
            for (token, value, top_ids, top_values), n in zip(rows, num_top, strict=True)
        ]


def logprobs(logits: Tensor, ids: Tensor, num_top: int) -> Logprobs:
    """Log-probabilities under unmodified `logits` [n, vocab_size] of `ids` [n], with `num_top` alternatives each."""
    logits = logits.float()
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    top_values, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    return Logprobs(ids, (logits.gather(1, ids[:, None]) - log_total)[:, 0], top_ids, top_values - log_total)


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> Array:
    """Numbers in [0, 1), fixed by seed (modulo 2^64) and position: SplitMix64 (Steele et al. 2014), chained."""
    streams = _mix(np.array([(seed + _GOLDEN_GAMMA) & _MASK_64 for seed in seeds], np.uint64))
    steps = np.array([(position + 1) * _GOLDEN_GAMMA & _MASK_64 for position in positions], np.uint64)
    numbers: Array = (_mix(streams + steps) >> np.uint64(11)) * 2.0**-53
    return numbers


def _mix(x: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Samples for a model with the given end-of-sequence tokens, which `min_tokens` bans."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._penalties = Penalties()

    def prepare(self, vocab_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compile now what a GPU would compile at the first request of each kind, for logits of `dtype`."""
        kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {}, {"top_k": 2, "top_p": 0.5}, {"min_p": 0.5}]
        penalties: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5}
        logits = torch.zeros((1, vocab_size), dtype=dtype, device=device)
        for kind, more in itertools.product(kinds, ({}, penalties)):
            self.sample(logits, [SampleRequest(Sampling(seed=0, max_tokens=1, **kind, **more), (0,), (0,))])

    def forget(self) -> None:
        """A call may have ended in its midst: what the device knows of histories is sent again."""
        self._penalties = Penalties()

    def sample(self, logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
        """Token ids [n], int64 on the logits' device, for `logits` [n, vocab_size], which stay as they are."""
        penalized = [row for row, request in enumerate(requests) if has_penalties(request.sampling)]
        if len(penalized) == len(requests):
            return self._draw(self._penalties.apply(logits, requests), requests)
        tokens = self._draw(logits, requests)
        if penalized:
            # Apart, for their logits are float32: whose are not must not be added up in another order for their sake.
            at = upload(np.array(penalized), logits.device)
            theirs = [requests[row] for row in penalized]
            tokens[at] = self._draw(self._penalties.apply(logits.index_select(0, at), theirs), theirs)
        return tokens

    def _draw(self, logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
        adjusted = logits
        banned = [
            (row, token) for row, request in enumerate(requests) for token in self._banned(request, logits.shape[1])
        ]
        if banned:
            adjusted = logits.clone()
            at = upload(np.array(banned), logits.device).unbind(1)
            adjusted.index_put_(at, adjusted.new_full((), float("-inf")))  # a number would make the host wait
        if all(request.sampling.temperature <= 0 for request in requests):
            return sampling.sample(adjusted, None, None, None, None, None)
        return sampling.sample(adjusted, *_parameters(requests, logits.device))

    def _banned(self, request: SampleRequest, vocab_size: int) -> list[int]:
        """Tokens that would end the output too early."""
        if request.num_output >= request.sampling.min_tokens:
            return []
        ending = {*request.sampling.stop_token_ids, *(() if request.sampling.ignore_eos else self._eos_token_ids)}
        return [token for token in ending if 0 <= token < vocab_size]


def _parameters(requests: Sequence[SampleRequest], device: torch.device) -> list[Tensor | None]:
    """What `pd_kernels.sampling.sample` wants to know, on the device; None for a filter that no row asks for."""
    chosen = [request.sampling for request in requests]
    columns = np.array(
        [
            [one.temperature for one in chosen],
            [one.top_k for one in chosen],
            [one.top_p for one in chosen],
            [one.min_p for one in chosen],
            uniform([one.seed for one in chosen], [request.position for request in requests]),
        ]
    )
    temperature, top_k, top_p, min_p, _ = columns
    is_wanted = [True, *((temperature > 0) & asks for asks in (top_k > 0, top_p < 1, min_p > 0)), True]
    sent = upload(columns, device).unbind(0)
    return [column if np.any(wanted) else None for column, wanted in zip(sent, is_wanted, strict=True)]

"""Draws tokens from logits, and computes log-probabilities. `ModelRunner` calls it on rank 0.

Each row goes through penalties (`penalties`), `min_tokens`, and then temperature, filters and the draw
(`pd_kernels.sampling`). The draw uses a random number that depends on (seed, position) alone. So equal logits give
equal tokens, whatever else is in the batch and whichever worker computes it. Between calls, only the table of penalties
is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels import sampling
from pdserve.engine.layers.step_input import upload
from pdserve.engine.run.penalties import Penalties, has_penalties
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Sampling, TokenLogprob

Array = np.ndarray[Any, Any]

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of some tokens, and of the best alternatives to each.

    Attributes:
        items: of each row, the number of its item in the step.
        num_top: how many alternatives each row wants.
        ids, values: [n] the tokens and their log-probabilities.
        top_ids, top_values: [n, k] the most probable tokens, best first; k is the greatest of `num_top`.
    """

    items: Sequence[int]
    num_top: Sequence[int]
    ids: Tensor
    values: Tensor
    top_ids: Tensor
    top_values: Tensor

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor, num_top: Sequence[int], items: Sequence[int]) -> Logprobs:
        """Of `ids` [n] under unmodified `logits` [n, vocab_size], with `num_top` alternatives each."""
        logits = logits.float()
        log_total = logits.logsumexp(dim=-1, keepdim=True)
        top_values, top_ids = logits.topk(min(max(num_top), logits.shape[1]), dim=-1)
        values = (logits.gather(1, ids[:, None]) - log_total)[:, 0]
        return cls(items, num_top, ids, values, top_ids, top_values - log_total)

    def to_host(self) -> Logprobs:
        """Start the copy to the host. On a CUDA device the result is valid once the stream has got this far."""
        tensors = (self.ids, self.values, self.top_ids, self.top_values)
        return Logprobs(self.items, self.num_top, *(each.to("cpu", non_blocking=True) for each in tensors))

    def entries(self) -> list[TokenLogprob]:
        """A message for each row. The tensors must be on the host."""
        rows = zip(
            self.num_top, self.ids.tolist(), self.values.tolist(), self.top_ids.tolist(), self.top_values.tolist(),
            strict=True,
        )  # fmt: skip
        return [
            TokenLogprob(token, value, list(zip(top_ids[:n], top_values[:n], strict=True)))
            for n, token, value, top_ids, top_values in rows
        ]


def is_argmax(item: BatchItem) -> bool:
    """Whether each token drawn for `item` is simply the most probable one."""
    sampling = item.sampling
    return sampling.temperature <= 0 and not has_penalties(sampling) and _num_output(item) >= sampling.min_tokens


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
            self.sample(logits, [BatchItem((0,), 1, (), 1, Sampling(seed=0, max_tokens=1, **kind, **more), (0,), (0,))])

    def forget(self) -> None:
        """A call may have ended in its midst: what the device knows of histories is sent again."""
        self._penalties = Penalties()

    def sample(self, logits: Tensor, items: Sequence[BatchItem]) -> Tensor:
        """Token ids [n], int64 on the logits' device, for `logits` [n, vocab_size], which stay as they are.

        Args:
            items: the item of each row; one with drafts is that of `num_sampled` rows, one after the other.
        """
        num_drafts = _drafts_before(items)
        penalized = [row for row, item in enumerate(items) if has_penalties(item.sampling)]
        if len(penalized) == len(items):
            return self._draw(self._penalties.apply(logits, items, num_drafts), items, num_drafts)
        tokens = self._draw(logits, items, num_drafts)
        if penalized:
            # Apart, for their logits are float32: whose are not must not be added up in another order for their sake.
            at = upload(np.array(penalized), logits.device)
            theirs, drafts = [items[row] for row in penalized], [num_drafts[row] for row in penalized]
            adjusted = self._penalties.apply(logits.index_select(0, at), theirs, drafts)
            tokens[at] = self._draw(adjusted, theirs, drafts)
        return tokens

    def _draw(self, logits: Tensor, items: Sequence[BatchItem], num_drafts: Sequence[int]) -> Tensor:
        adjusted = logits
        banned = [
            (row, token)
            for row, item in enumerate(items)
            if item.sampling.min_tokens > _num_output(item) + num_drafts[row]
            for token in self._ending(item.sampling, logits.shape[1])
        ]
        if banned:
            adjusted = logits.clone()
            at = upload(np.array(banned), logits.device).unbind(1)
            adjusted.index_put_(at, adjusted.new_full((), float("-inf")))  # a number would make the host wait
        if all(item.sampling.temperature <= 0 for item in items):
            return sampling.sample(adjusted, None, None, None, None, None)
        return sampling.sample(adjusted, *_parameters(items, num_drafts, logits.device))

    def _ending(self, sampling: Sampling, vocab_size: int) -> list[int]:
        """Tokens that would end the output."""
        ending = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self._eos_token_ids)}
        return [token for token in ending if 0 <= token < vocab_size]


def _num_output(item: BatchItem) -> int:
    """Output tokens before the item's first draw, the one that only the device knows included."""
    return len(item.output_ids) + (item.previous is not None)


def _drafts_before(items: Sequence[BatchItem]) -> list[int]:
    """How many of its item's drafts stand before each row's draw."""
    num_drafts = [0] * len(items)
    if any(item.num_sampled > 1 for item in items):
        for row in range(1, len(items)):
            if items[row] is items[row - 1]:
                num_drafts[row] = (num_drafts[row - 1] + 1) % items[row].num_sampled
    return num_drafts


def _parameters(items: Sequence[BatchItem], num_drafts: Sequence[int], device: torch.device) -> list[Tensor | None]:
    """What `pd_kernels.sampling.sample` wants to know, on the device; None for a filter that no row asks for."""
    chosen = [item.sampling for item in items]
    positions = [len(item.prompt_ids) + _num_output(item) + num for item, num in zip(items, num_drafts, strict=True)]
    columns = np.array(
        [
            [one.temperature for one in chosen],
            [one.top_k for one in chosen],
            [one.top_p for one in chosen],
            [one.min_p for one in chosen],
            uniform([one.seed for one in chosen], positions),
        ]
    )
    temperature, top_k, top_p, min_p, _ = columns
    is_wanted = [True, *((temperature > 0) & asks for asks in (top_k > 0, top_p < 1, min_p > 0)), True]
    sent = upload(columns, device).unbind(0)
    return [column if np.any(wanted) else None for column, wanted in zip(sent, is_wanted, strict=True)]

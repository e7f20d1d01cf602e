"""Picks tokens from logits.

The pipeline of a row: penalties, `min_tokens`, temperature, top-k, top-p, min-p, draw. Filters follow Hugging Face's
logits processors, except that top-p also keeps tokens tied with the last one it keeps. The draw inverts the
cumulative distribution in vocabulary order at a number that depends on (seed, position) only: equal logits give equal
tokens, whatever else is in the batch and whichever worker computes it. Nothing here keeps state between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.layers.step_input import upload
from pdserve.protocol import Sampling, TokenLogprob

Array = np.ndarray[Any, Any]

_MASK_64 = (1 << 64) - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
# On a CPU, top-p looks at this many of the most probable tokens first; mostly they suffice.
_TOP_P_CANDIDATES = 256
# A probability is at most 1.0, whose bits are an integer below 2^30.
_FLOAT_BITS = 30


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """A row to sample: how, and the history that penalties, `min_tokens` and the draw depend on.

    `num_pending` output tokens exist on the device and are not in `output_ids` yet. They count for the draw's position
    and for `min_tokens`; a request with penalties has none.
    """

    sampling: Sampling
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    num_pending: int = 0

    @property
    def is_argmax(self) -> bool:
        """Whether the token is simply the most probable one."""
        sampling = self.sampling
        return (
            sampling.temperature <= 0
            and sampling.repetition_penalty == 1.0
            and not (sampling.presence_penalty or sampling.frequency_penalty)
            and len(self.output_ids) + self.num_pending >= sampling.min_tokens
        )


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
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    top_values, top_ids = logits.topk(min(num_top, logits.shape[1]), dim=-1)
    return Logprobs(ids, (logits.gather(1, ids[:, None]) - log_total)[:, 0], top_ids, top_values - log_total)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by `seed` (modulo 2^64) and `position`: SplitMix64 (Steele et al. 2014), chained."""
    stream = _mix(seed + _GOLDEN_GAMMA)
    return (_mix(stream + (position + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x &= _MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return x ^ (x >> 31)


class Sampler:
    """Samples for a model with the given end-of-sequence tokens, which `min_tokens` bans."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
        """Token ids [n], int64 on the logits' device, for `logits` [n, vocab_size] float32, which stay as they are."""
        logits = self._adjust(logits, requests)
        drawing = [index for index, request in enumerate(requests) if request.sampling.temperature > 0]
        if not drawing:
            return logits.argmax(dim=-1)
        if len(drawing) == len(requests):
            return _draw(logits, requests)
        rows = upload(np.array(drawing), logits.device)
        drawn = _draw(logits.index_select(0, rows), [requests[index] for index in drawing])
        return logits.argmax(dim=-1).index_copy_(0, rows, drawn)

    def _adjust(self, logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
        """`logits` after penalties and bans; the same tensor if no request has any."""
        repetition = [_repetition_edits(row, request) for row, request in enumerate(requests)]
        counting = [_count_edits(row, request) for row, request in enumerate(requests)]
        banned = [self._ban_edits(row, request, logits.shape[1]) for row, request in enumerate(requests)]
        edits = [_upload_edits(kind, logits.device) for kind in (repetition, counting, banned)]
        if any(edit is not None for edit in edits):
            logits = logits.clone()
        repeated, counted, ban = edits
        if repeated is not None:
            values = logits[repeated.at]
            scaled = torch.where(values > 0, values / repeated.amounts, values * repeated.amounts)
            logits.index_put_(repeated.at, scaled)
        if counted is not None:
            logits.index_put_(counted.at, -counted.amounts, accumulate=True)
        if ban is not None:
            logits.index_put_(ban.at, ban.amounts)
        return logits

    def _ban_edits(self, row: int, request: SampleRequest, vocab_size: int) -> Array | None:
        sampling = request.sampling
        if len(request.output_ids) + request.num_pending >= sampling.min_tokens:
            return None
        ending = set(sampling.stop_token_ids) | set(() if sampling.ignore_eos else self._eos_token_ids)
        tokens = np.array([token for token in ending if token < vocab_size], np.int64)
        return _edits(row, tokens, np.full(len(tokens), -np.inf))


@dataclass(frozen=True, slots=True)
class _DeviceEdits:
    """Changes to the logits at (rows, tokens) `at`, each place once, by `amounts`."""

    at: tuple[Tensor, Tensor]
    amounts: Tensor


def _edits(row: int, tokens: Array, amounts: Array) -> Array:
    """Changes to some logits of one row, each token once: [3, n] of row, token and amount."""
    return np.stack([np.full(len(tokens), row, np.float64), tokens, amounts])


def _upload_edits(edits: Sequence[Array | None], device: torch.device) -> _DeviceEdits | None:
    tables = [edit for edit in edits if edit is not None]
    if not tables:
        return None
    rows, tokens, amounts = upload(np.concatenate(tables, axis=1), device).unbind(0)
    return _DeviceEdits((rows.long(), tokens.long()), amounts.float())


def _repetition_edits(row: int, request: SampleRequest) -> Array | None:
    """A factor on every token of prompt and output (arXiv 1909.05858, §4.1)."""
    penalty = request.sampling.repetition_penalty
    if penalty == 1.0:
        return None
    tokens = np.unique(np.array([*request.prompt_ids, *request.output_ids], np.int64))
    return _edits(row, tokens, np.full(len(tokens), penalty))


def _count_edits(row: int, request: SampleRequest) -> Array | None:
    """Presence and frequency penalty of every token of the output (OpenAI API reference)."""
    sampling = request.sampling
    if not request.output_ids or not (sampling.presence_penalty or sampling.frequency_penalty):
        return None
    tokens, counts = np.unique(np.array(request.output_ids, np.int64), return_counts=True)
    return _edits(row, tokens, sampling.presence_penalty + sampling.frequency_penalty * counts)


def _draw(logits: Tensor, requests: Sequence[SampleRequest]) -> Tensor:
    """One token a row, from the filtered distribution; every request has a temperature above 0."""
    samplings = [request.sampling for request in requests]
    numbers = [uniform(r.sampling.seed, len(r.prompt_ids) + len(r.output_ids) + r.num_pending) for r in requests]
    columns = [[s.temperature for s in samplings], [s.top_p for s in samplings], [s.min_p for s in samplings], numbers]
    temperature, top_p, min_p, number = upload(np.array(columns), logits.device)[:, :, None].unbind(0)
    # Shifted before it is scaled, so that a tiny temperature can't overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature.float()
    scaled = _keep_top_k(scaled, [s.top_k for s in samplings])
    probs = scaled.softmax(dim=-1)
    threshold = probs.amax(dim=-1, keepdim=True) * min_p.float()
    if any(s.top_p < 1 for s in samplings):
        threshold = threshold.maximum(_top_p_threshold(probs, top_p.float()))
    if any(s.top_p < 1 or s.min_p > 0 for s in samplings):
        probs = probs.masked_fill(probs < threshold, 0.0)
    return _invert_cdf(probs, number)


def _keep_top_k(scaled: Tensor, top_k: Sequence[int]) -> Tensor:
    """Everything below the k-th largest becomes -inf; k = 0 keeps all."""
    vocab_size = scaled.shape[1]
    kept = [k if 0 < k < vocab_size else vocab_size for k in top_k]
    most = max((k for k in kept if k < vocab_size), default=0)
    if not most:
        return scaled
    ranks = upload(np.array([min(k, most) - 1 for k in kept]), scaled.device)[:, None]
    kth = scaled.topk(most, dim=-1).values.gather(1, ranks)
    everything = upload(np.array([k == vocab_size for k in kept]), scaled.device)[:, None]
    return scaled.masked_fill((scaled < kth) & ~everything, float("-inf"))


def _top_p_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """The least probability that is kept, [n, 1]: the most probable tokens are kept until `top_p` [n, 1] is reached."""
    if probs.is_cuda:  # to look at some candidates first would make the host wait for the device
        return _bisect_threshold(probs, top_p)
    candidates = probs.topk(min(_TOP_P_CANDIDATES, probs.shape[1]), dim=-1).values
    cumulative = candidates.cumsum(dim=-1)
    num_kept = (cumulative - candidates < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
    threshold = candidates.gather(1, num_kept - 1)
    rows = (cumulative[:, -1:] < top_p).flatten().nonzero().flatten()
    if len(rows):
        threshold.index_copy_(0, rows, _bisect_threshold(probs.index_select(0, rows), top_p.index_select(0, rows)))
    return threshold.masked_fill_(top_p >= 1, 0.0)


def _bisect_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """The largest number t with sum(probs >= t) >= top_p, found without sorting: floats >= 0 order like their bits."""
    high = probs.amax(dim=-1, keepdim=True).view(torch.int32)
    low = torch.zeros_like(high)
    for _ in range(_FLOAT_BITS):
        middle = low + (high - low + 1) // 2
        kept = probs.masked_fill(probs < middle.view(torch.float32), 0.0)
        reached = kept.sum(dim=-1, keepdim=True) >= top_p
        low = torch.where(reached, middle, low)
        high = torch.where(reached, high, middle - 1)
    return low.view(torch.float32).masked_fill(top_p >= 1, 0.0)


def _invert_cdf(probs: Tensor, number: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds `number` [n, 1] times the row's total."""
    # A CPU sums in double precision by itself; on a GPU, parallel float32 sums could depend on the batch's shape.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64 if probs.is_cuda else torch.float32)
    total = cumulative[:, -1:]
    below_total = total.nextafter(torch.zeros_like(total))
    target = (number.to(total.dtype) * total).minimum(below_total)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)

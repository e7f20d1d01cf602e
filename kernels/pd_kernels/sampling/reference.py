"""Sampling in torch: the oracle of the Triton kernels, and what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# Top-p looks at this many of the most probable tokens first; mostly they suffice.
_TOP_P_CANDIDATES = 256
# A probability is at most 1.0, whose bits are an integer below 2^30.
_FLOAT_BITS = 30


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    number: Tensor | None,
) -> Tensor:  # fmt: skip
    if temperature is None or number is None or not len(logits):
        return logits.argmax(dim=-1)
    drawing = temperature > 0
    if bool(drawing.all()):
        return _draw(logits, temperature, top_k, top_p, min_p, number)
    tokens = logits.argmax(dim=-1)
    rows = drawing.nonzero().flatten()
    if len(rows):
        top_k, top_p, min_p = (None if column is None else column[rows] for column in (top_k, top_p, min_p))
        tokens[rows] = _draw(logits[rows], temperature[rows], top_k, top_p, min_p, number[rows])
    return tokens


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    number: Tensor,
) -> Tensor:  # fmt: skip
    """One token a row, from the filtered distribution; every temperature is above 0."""
    logits = logits.float()
    # Shifted before it is scaled, so that a tiny temperature can't overflow.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature.float()[:, None])
    if top_k is not None:
        scaled = _keep_top_k(scaled, top_k)
    probs = scaled.softmax(dim=-1)
    threshold = torch.zeros(len(probs), 1, device=probs.device)
    if min_p is not None:
        threshold = probs.amax(dim=-1, keepdim=True) * min_p.float()[:, None]
    if top_p is not None and bool((top_p < 1).any()):
        threshold = threshold.maximum(_top_p_threshold(probs, top_p.float()[:, None]))
    if bool((threshold > 0).any()):
        probs = probs.masked_fill_(probs < threshold, 0.0)
    return _invert_cdf(probs, number[:, None])


def _keep_top_k(scaled: Tensor, top_k: Tensor) -> Tensor:
    """Everything below the k-th largest becomes -inf; k = 0 keeps all."""
    vocab_size = scaled.shape[1]
    limited = (top_k > 0) & (top_k < vocab_size)
    kept = top_k.long().where(limited, 1)
    most = int(kept.max())
    if not bool(limited.any()):
        return scaled
    kth = scaled.topk(most, dim=-1).values.gather(1, kept[:, None] - 1)
    return scaled.masked_fill((scaled < kth) & limited[:, None], float("-inf"))


def _top_p_threshold(probs: Tensor, top_p: Tensor) -> Tensor:
    """The least probability that is kept, [n, 1]: the most probable tokens are kept until `top_p` [n, 1] is reached."""
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
    return low.view(torch.float32)


def _invert_cdf(probs: Tensor, number: Tensor) -> Tensor:
    """The first token of each row whose cumulative probability exceeds `number` [n, 1] times the row's total."""
    # A CPU sums in double precision by itself; on a GPU, parallel float32 sums could depend on the batch's shape.
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64 if probs.is_cuda else torch.float32)
    total = cumulative[:, -1:]
    below_total = total.nextafter(torch.zeros_like(total))
    target = (number.to(total.dtype) * total).minimum(below_total)
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_(max=probs.shape[1] - 1)

"""Sampling: the torch oracle and the Triton kernels against a plain one in double precision, which sorts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pd_kernels.sampling import reference, triton_kernel

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BLOCK = 256
VOCAB_SIZES = [700, 701]  # several chunks, the last one not full; rows on 16 bytes, and not
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

Sample = Callable[..., Tensor]


def run_reference(logits: Tensor, *parameters: Tensor | None) -> Tensor:
    return reference.sample(logits, *parameters)


def run_triton(logits: Tensor, *parameters: Tensor | None) -> Tensor:
    out = torch.full((len(logits),), -1, device=logits.device)
    assert triton_kernel.sample(logits, *parameters, out, block=BLOCK) is out
    return out


@pytest.fixture(params=[run_reference, run_triton], ids=["torch", "triton"])
def sample(request: pytest.FixtureRequest) -> Sample:
    chosen: Sample = request.param
    return chosen


def columns(rows: list[dict[str, Any]], device: torch.device) -> list[Tensor]:
    """The parameters of rows as the sampler sends them: one table of float64."""
    names = ("temperature", "top_k", "top_p", "min_p", "number")
    table = [[{**NEUTRAL, "number": 0.5, **row}[name] for row in rows] for name in names]
    return list(torch.tensor(table, dtype=torch.float64, device=device))


def kept(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Probabilities [vocab_size], float64, of what the filters leave, by their definitions."""
    logits = logits.double().cpu()
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.sort().values[-top_k], -math.inf)
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        ordered = probs.sort(descending=True).values
        num_kept = max(1, int((ordered.cumsum(0) - ordered < top_p).sum()))
        threshold = ordered[num_kept - 1]
    else:
        threshold = torch.zeros((), dtype=torch.float64)
    threshold = threshold.maximum(probs.max() * min_p)
    probs = probs.masked_fill(probs < threshold, 0.0)
    return probs / probs.sum()


def middles(probs: Tensor, at_most: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens and, for each, the number in the middle of its share: rounding can't reach its ends."""
    tokens = probs.topk(at_most).indices[: int((probs > 1e-5).sum())]
    ends = probs.cumsum(0)
    return tokens.tolist(), (ends[tokens] - probs[tokens] / 2).tolist()


def noise(vocab_size: int, scale: float, device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)).mul(scale).to(device)


FILTERS = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5, "top_p": 0.7},
    {"top_p": 0.02},
    {"top_p": 0.9999},
    {"top_k": 1},
    {"top_k": 37},
    {"top_k": 699},
    {"top_k": 5000},
    {"min_p": 0.3},
    {"top_k": 60, "top_p": 0.8, "min_p": 0.05, "temperature": 0.9},
    {"top_k": 200, "top_p": 0.3, "temperature": 3.0},
]


@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
def test_draws_invert_the_filtered_distribution(
    vocab_size: int, scale: float, sample: Sample, device: torch.device
) -> None:
    logits = noise(vocab_size, scale, device)
    rows, expected = [], []
    for filters in FILTERS:
        tokens, numbers = middles(kept(logits, **{**NEUTRAL, **filters}), 2)
        expected += tokens
        rows += [{**filters, "number": number} for number in numbers]
    table = logits.repeat(len(rows), 1)
    assert sample(table, *columns(rows, device)).tolist() == expected
    assert torch.equal(table, logits.repeat(len(rows), 1)), "logits stay as they are"


@pytest.mark.parametrize("levels", [1, 2])
def test_a_list_longer_than_a_tile(levels: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "_DECIDE_TILE", 128)
    monkeypatch.setattr(triton_kernel, "_NUM_LEVELS", levels)
    # Equal parts of the interval separate the outlier from all others: nearly everything stays in the list.
    logits = torch.linspace(0, 0.01, 700, device=device)[torch.randperm(700)]
    logits[5] = 3.0
    for filters in ({"top_p": 0.6}, {"top_k": 321}, {"top_k": 500, "top_p": 0.2}):
        tokens, numbers = middles(kept(logits, **{**NEUTRAL, **filters}), 1)
        rows = [{**filters, "number": number} for number in numbers]
        assert run_triton(logits.repeat(len(rows), 1), *columns(rows, device)).tolist() == tokens


def test_ties_with_the_last_kept_token_are_kept(sample: Sample, device: torch.device) -> None:
    logits = torch.full((1, 700), -20.0, device=device)
    logits[0, [3, 250, 300, 699]] = 1.0
    logits[0, 400] = 2.0
    for filters in ({"top_k": 2}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5, "min_p": 0.3}):
        rows = [{**filters, "number": number} for number in (0.0, 0.15, 0.3, 0.42, 0.5, 0.9, 0.999999)]
        drawn = sample(logits.repeat(len(rows), 1), *columns(rows, device)).tolist()
        # Shares in vocabulary order: 1, 1, 1, e, 1 of 4 + e.
        assert drawn == [3, 250, 300, 300, 400, 699, 699]


def test_greedy_takes_the_first_of_equals(sample: Sample, device: torch.device) -> None:
    logits = torch.zeros(3, 700, device=device)
    logits[1, [699, 255, 256]] = 1.0
    logits[2] = -math.inf
    rows = [{"temperature": 0.0, "top_k": 3, "top_p": 0.1, "min_p": 0.9}] * 3
    assert sample(logits, *columns(rows, device)).tolist() == [0, 255, 0]
    assert sample(logits, None, None, None, None, None).tolist() == [0, 255, 0]


def test_a_row_depends_on_nothing_but_itself(sample: Sample, device: torch.device) -> None:
    rows = [{**filters, "number": (0.123, 0.987)[at % 2]} for at, filters in enumerate(FILTERS)]
    rows[3]["temperature"] = 0.0
    logits = torch.stack([noise(700, 0.5 + row % 5, device, row) for row in range(len(rows))])
    parameters = columns(rows, device)
    together = sample(logits, *parameters)
    order = torch.randperm(len(rows)).to(device)
    assert torch.equal(sample(logits[order], *(column[order] for column in parameters)), together[order])
    for row, given in enumerate(rows):
        asked = {**NEUTRAL, **given}
        alone = [column[row : row + 1] for column in parameters]
        wanted = [True, asked["top_k"] > 0, asked["top_p"] < 1, asked["min_p"] > 0, True]
        alone = [column if is_wanted else None for column, is_wanted in zip(alone, wanted, strict=True)]
        assert sample(logits[row : row + 1], *alone).tolist() == together[row : row + 1].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_read_as_float32(dtype: torch.dtype, sample: Sample, device: torch.device) -> None:
    rows = [{**filters, "number": 0.7} for filters in FILTERS[-3:]]
    logits = noise(700, 2.0, device).to(dtype).repeat(len(rows), 1)
    parameters = columns(rows, device)
    assert torch.equal(sample(logits, *parameters), sample(logits.float(), *parameters))
    narrow = [parameters[0].float(), parameters[1].int(), *(column.float() for column in parameters[2:])]
    assert torch.equal(sample(logits, *narrow), sample(logits.float(), *parameters))


def test_banned_tokens_are_never_drawn(sample: Sample, device: torch.device) -> None:
    logits = noise(700, 1.0, device).repeat(6, 1)
    logits[:, :300] = -math.inf  # a whole chunk and more
    logits[:, 302:] = -math.inf
    filters = [{}, {"top_k": 400}, {"top_p": 0.99999}]
    rows = [{**one, "number": number} for one in filters for number in (0.0, 1 - 2.0**-53)]
    assert sample(logits, *columns(rows, device)).tolist() == [300, 301] * 3


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e30])
def test_extreme_temperatures(temperature: float, sample: Sample, device: torch.device) -> None:
    logits = torch.tensor([[-3e38, 1.0, 2.0, 3e38, 0.0, 2.5, -1.0, 0.5]], device=device)
    for filters in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
        rows = [{"temperature": temperature, "number": 0.4, **filters}]
        token = sample(logits, *columns(rows, device)).item()
        assert token == 3 if temperature < 1 else token in range(8)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_row_stays_in_the_vocabulary_and_alone(broken: float, sample: Sample, device: torch.device) -> None:
    logits = torch.stack([torch.full((700,), broken, device=device), noise(700, 2.0, device)]).repeat(4, 1)
    logits[2, 1:] = 0.5  # only one logit is broken
    filters = [{"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9}]
    rows = [{**one, "number": 0.6} for one in filters for _ in range(2)]
    parameters = columns(rows, device)
    tokens = sample(logits, *parameters)
    assert all(0 <= token < 700 for token in tokens.tolist())
    assert torch.equal(tokens[1::2], sample(logits[1::2], *(column[1::2] for column in parameters)))


def test_rows_that_break_the_reading_are_refused(device: torch.device) -> None:
    parameters = columns([{}] * 4, device)
    with pytest.raises(ValueError, match="16 bytes"):
        run_triton(torch.zeros(4, 701, device=device)[:, 1:], *parameters)
    with pytest.raises(ValueError, match="dense"):
        run_triton(torch.zeros(700, 4, device=device).T, *parameters)


def test_no_rows(sample: Sample, device: torch.device) -> None:
    assert sample(torch.zeros(0, 700, device=device), *columns([], device)).shape == (0,)


@pytest.mark.gpu
def test_a_captured_graph_takes_new_parameters_and_logits() -> None:
    device = torch.device("cuda")
    rows = [{**filters, "number": 0.3} for filters in FILTERS]
    logits, parameters = torch.empty(len(rows), 128256, device=device), columns(rows, device)
    out = torch.empty(len(rows), dtype=torch.int64, device=device)
    logits.normal_()
    triton_kernel.sample(logits, *parameters, out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton_kernel.sample(logits, *parameters, out)
    for seed in range(3):
        logits.normal_(0, 1 + seed)
        order = torch.randperm(len(rows), device=device)
        for column in parameters:
            column.copy_(column[order])
        out.fill_(-1)
        graph.replay()
        assert torch.equal(out, triton_kernel.sample(logits, *parameters, torch.empty_like(out)))

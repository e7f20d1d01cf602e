"""The sampler: its distribution, its filters against transformers', and independence of everything but its key."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pdserve.engine.run import penalties, sampler
from pdserve.engine.run.sampler import Logprobs, Sampler, is_argmax, uniform
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Sampling

EOS = 3
NUM_DRAWS = 20_000
PINNED = [0.6524484863740322, 0.36818951565166946, 0.7012121095215252, 0.1450707396536649]
INT64 = st.integers(-(2**63), 2**64 - 1)


def item(
    sampling: Sampling,
    prompt: Sequence[int],
    output: Sequence[int],
    previous: int | None = None,
    drafts: Sequence[int] = (),
) -> BatchItem:
    """A row that is sampled after `prompt` and `output`, and one more after each of `drafts`."""
    return BatchItem([0, *drafts], 0, (), 1 + len(drafts), sampling, prompt, output, previous=previous)


def request(
    prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), drafts: tuple[int, ...] = (), **sampling: Any
) -> BatchItem:
    return item(Sampling(**{"seed": 0, "max_tokens": 100, **sampling}), prompt, output, drafts=drafts)


def sample(logits: torch.Tensor, *requests: BatchItem) -> list[int]:
    return Sampler([EOS]).sample(logits, requests).tolist()


def frequencies(logits: torch.Tensor, **sampling: Any) -> torch.Tensor:
    """How often each token is drawn over many seeds."""
    rows = logits.expand(NUM_DRAWS, -1)
    requests = [request(seed=seed, **sampling) for seed in range(NUM_DRAWS)]
    drawn = Sampler([]).sample(rows, requests)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / NUM_DRAWS


def assert_distribution(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert not actual[expected == 0].any()
    deviation = (actual - expected).abs()
    assert bool((deviation <= 4.5 * (expected * (1 - expected) / NUM_DRAWS).sqrt() + 1e-9).all())


def test_uniform_numbers_are_uniform_and_independent() -> None:
    by_seed = torch.from_numpy(uniform(range(NUM_DRAWS), [17] * NUM_DRAWS))
    by_position = torch.from_numpy(uniform([5] * NUM_DRAWS, range(NUM_DRAWS)))
    for numbers in (by_seed, by_position):
        assert bool(((numbers >= 0) & (numbers < 1)).all())
        expected = torch.linspace(0, 1, NUM_DRAWS, dtype=torch.float64)
        assert float((numbers.sort().values - expected).abs().max()) < 1.63 / math.sqrt(NUM_DRAWS)  # 1 % of K-S
        assert abs(float(torch.corrcoef(torch.stack([numbers[1:], numbers[:-1]]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([by_seed, by_position]))[0, 1])) < 0.03


@given(seed=INT64, position=st.integers(0, 2**40))
def test_any_key_gives_a_number_and_neighbours_differ(seed: int, position: int) -> None:
    number, *neighbours = uniform([seed, seed, seed + 1], [position, position + 1, position])
    assert 0 <= number < 1
    assert number == uniform([seed], [position])[0]
    assert number not in neighbours


def test_the_key_is_fixed_for_ever() -> None:
    """A request that moves to a worker of a newer version must continue the same stream."""
    assert uniform([0, 1, 0, 2**64 - 1], [0, 0, 1, 12345]).tolist() == PINNED


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, 3.0, 0.0, 2.9, -4.0]])
    actual = frequencies(logits, temperature=temperature)
    assert_distribution(actual, (logits[0] / temperature).softmax(-1))


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 3}, {"top_k": 1}, {"top_k": 500}, {"top_p": 0.6}, {"top_p": 0.05}, {"min_p": 0.2},
        {"top_k": 6, "top_p": 0.8, "min_p": 0.1, "temperature": 1.7},
    ],
    ids=str,
)  # fmt: skip
def test_filters_are_those_of_transformers(filters: dict[str, Any]) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3)) * 1.5
    warpers = LogitsProcessorList([TemperatureLogitsWarper(filters.get("temperature", 1.0))])
    if "top_k" in filters:
        warpers.append(TopKLogitsWarper(filters["top_k"]))
    if "top_p" in filters:
        warpers.append(TopPLogitsWarper(filters["top_p"]))
    if "min_p" in filters:
        warpers.append(MinPLogitsWarper(filters["min_p"]))
    expected = warpers(torch.zeros(1, 0, dtype=torch.int64), logits).softmax(-1)[0]
    assert_distribution(frequencies(logits, **filters), expected)


def test_top_p_beyond_the_candidates_that_are_looked_at_first() -> None:
    flat = torch.linspace(0, 0.1, 800)[None]
    kept = frequencies(flat, top_p=0.5) > 0
    expected = TopPLogitsWarper(0.5)(torch.zeros(1, 0, dtype=torch.int64), flat)[0].isfinite()
    assert torch.equal(kept, expected)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_row_does_not_depend_on_the_others(data: st.DataObject) -> None:
    one = st.builds(
        lambda prompt, output, **sampling: request(tuple(prompt), tuple(output), **sampling),
        prompt=st.lists(st.integers(0, 29), max_size=4),
        output=st.lists(st.integers(0, 29), max_size=4),
        seed=INT64,
        temperature=st.sampled_from([0.0, 0.7, 1.3]),
        top_k=st.sampled_from([0, 1, 5, 50]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        min_p=st.sampled_from([0.0, 0.1]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        frequency_penalty=st.sampled_from([0.0, -0.5]),
        min_tokens=st.sampled_from([0, 3]),
    )
    requests = data.draw(st.lists(one, min_size=1, max_size=6))
    logits = torch.randn(len(requests), 30, generator=torch.Generator().manual_seed(1)) * 3
    untouched = logits.clone()
    together = sample(logits, *requests)
    assert torch.equal(logits, untouched)
    assert together == [sample(logits[i : i + 1], requests[i])[0] for i in range(len(requests))]
    assert together[::-1] == sample(logits.flip(0), *requests[::-1])


def test_the_position_is_the_whole_history() -> None:
    """A retried request carries earlier output in its prompt; its next token is the same."""
    logits = torch.zeros(1, 1000)
    moved = sample(logits, request((1, 2, 3, 4), ()))
    assert sample(logits, request((1, 2), (3, 4))) == moved
    assert sample(logits, request((1, 2), (3,))) != moved


def test_tokens_on_the_device_count_as_output() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, EOS] = 9.0
    soon = {"temperature": 0.0, "min_tokens": 3}
    for output, previous, expected in (((5,), None, 0), ((5,), 0, 0), ((5, 5), 0, EOS)):
        pending = item(Sampling(seed=0, max_tokens=9, **soon), (1, 2), output, previous)
        assert is_argmax(pending) == (len(output) == 2)
        assert Sampler([EOS]).sample(logits, [pending]).item() == expected
    drawing = Sampling(seed=0, max_tokens=9)
    flat = torch.zeros(1, 1000)
    arrived = Sampler([]).sample(flat, [item(drawing, (1, 2), (5, 6))])
    assert torch.equal(Sampler([]).sample(flat, [item(drawing, (1, 2), (5,), previous=0)]), arrived)
    assert not torch.equal(Sampler([]).sample(flat, [item(drawing, (1, 2), (5,))]), arrived)


@pytest.mark.parametrize(
    "kind",
    [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.0, "min_tokens": 4, "stop_token_ids": tuple(range(15))},
        {"repetition_penalty": 1.8},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 0.7},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.5, "min_tokens": 4},
    ],
    ids=str,
)
def test_a_draw_after_drafts_is_the_one_that_is_made_when_they_are_output(kind: dict[str, Any]) -> None:
    generator = random.Random(0)
    kept = Sampler([EOS])
    prompt, output = [1, 2, 2, 9], list[int]()
    sampling = Sampling(**{"seed": 5, "max_tokens": 100, **kind})
    for number in range(12):
        drafts = [generator.choice([2, 5, 9, 7]) for _ in range(generator.randint(0, 4))]
        logits = torch.randn(len(drafts) + 3, 30, generator=torch.Generator().manual_seed(number)) * 2
        others = [request((3, 4), (4,), temperature=0.0), request((3,), (3, 3), seed=1, presence_penalty=0.4)]
        drafted = item(sampling, prompt, output, drafts=drafts)
        rows = [others[0], *[drafted] * (len(drafts) + 1), others[1]]
        tokens = kept.sample(logits, rows).tolist()
        apart = [item(sampling, prompt, output + drafts[:at]) for at in range(len(drafts) + 1)]
        expected = [sample(logits[at : at + 1], row)[0] for at, row in enumerate([others[0], *apart, others[1]])]
        assert tokens == expected
        output += [generator.randrange(30) for _ in range(generator.randint(1, 2))]


class Growing:
    """Sequences as an engine has them: their lists grow, and a step samples some of them in some order."""

    def __init__(self, count: int, vocab_size: int, **sampling: Any) -> None:
        self._random = random.Random(0)
        self._vocab_size = vocab_size
        self._sampling = [Sampling(seed=seed, max_tokens=999, temperature=0.0, **sampling) for seed in range(count)]
        self.prompts = [[self._random.randrange(vocab_size) for _ in range(length)] for length in range(count)]
        self.outputs: list[list[int]] = [[] for _ in range(count)]

    def step(self, given: Sampler, batch: list[int]) -> None:
        """Sample a batch with `given`; a sampler that has seen nothing before must agree."""
        logits = torch.randn(
            len(batch), self._vocab_size, generator=torch.Generator().manual_seed(len(self.outputs[0]))
        )
        requests = [item(self._sampling[i], self.prompts[i], self.outputs[i]) for i in batch]
        drawn = given.sample(logits, requests).tolist()
        assert drawn == Sampler([]).sample(logits, requests).tolist()
        for i, token in zip(batch, drawn, strict=True):
            # Now and then more than one token comes between two steps of a sequence.
            self.outputs[i].extend([token, self._random.randrange(self._vocab_size)][: self._random.randint(1, 2)])

    def choose(self, most: int) -> list[int]:
        return self._random.sample(range(len(self.outputs)), self._random.randint(1, most))


@pytest.mark.parametrize(
    "sampling",
    [
        {"repetition_penalty": 1.4},
        {"presence_penalty": 0.7, "frequency_penalty": 0.3},
        {"repetition_penalty": 0.8, "frequency_penalty": -0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("most", [3, 30])
def test_penalties_follow_histories_that_grow(
    most: int, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables that must grow in both directions, and more sequences than stay in them."""
    monkeypatch.setattr(penalties, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(penalties, "_FEWEST_PLACES", 4)
    sequences, kept = Growing(30, 50, **sampling), Sampler([])
    for _ in range(12):
        sequences.step(kept, sequences.choose(most))
    if most == 3:
        assert len(kept._penalties._histories) <= 4, "what was not seen for longest makes room"


def test_a_step_sends_what_is_new_of_a_history(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    upload = penalties.upload
    monkeypatch.setattr(penalties, "upload", lambda values, device: sent.append(len(values)) or upload(values, device))
    kept, output = Sampler([]), [7, 8]
    asked = request(tuple(range(100)), repetition_penalty=1.2, temperature=0.0)
    for tokens in ((), (7,), (3, 4, 3)):
        output += tokens
        kept.sample(torch.randn(1, 200), [item(asked.sampling, asked.prompt_ids, output)])
    assert sent == [5 + 4 * 100, 5 + 4, 5 + 4 * 2]


def test_penalties_and_bans_leave_other_rows_alone() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(5))
    untouched = logits.clone()
    plain = request(temperature=0.0)
    penalized = request((1, 2), (int(logits[1].argmax()),), temperature=0.0, presence_penalty=50.0)
    banned = request(temperature=0.0, min_tokens=1, stop_token_ids=(int(logits[2].argmax()),))
    tokens = sample(logits, plain, penalized, banned, plain)
    assert torch.equal(logits, untouched)
    first, second = logits.topk(2).indices.unbind(1)
    assert tokens == [first[0], second[1], second[2], first[3]]


def test_a_penalized_row_is_sampled_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of the other rows keep their type: in another, their sums would be rounded otherwise."""
    seen: list[tuple[torch.dtype, int]] = []
    draw = sampler.sampling.sample

    def note(logits: Tensor, *parameters: Tensor | None) -> Tensor:
        seen.append((logits.dtype, len(logits)))
        return draw(logits, *parameters)

    monkeypatch.setattr(sampler.sampling, "sample", note)
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(6)).bfloat16()
    plain = [request(temperature=1.0, seed=seed) for seed in (1, 2, 3)]
    alone = sample(logits, *plain)
    assert seen == [(torch.bfloat16, 3)]
    seen.clear()
    together = sample(logits, plain[0], request((1,), (2,), temperature=1.0, presence_penalty=0.5), plain[2])
    assert seen == [(torch.bfloat16, 3), (torch.float32, 1)]
    assert (together[0], together[2]) == (alone[0], alone[2])


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = torch.randn(40, 15, generator=torch.Generator().manual_seed(0)) * 2
    prompt, output = (1, 2, 2, 9), (9, 4)
    history = torch.tensor([[*prompt, *output]]).expand(40, -1)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone()).argmax(-1)
    requests = [request(prompt, output, temperature=0.0, repetition_penalty=penalty)] * 40
    assert sample(logits, *requests) == expected.tolist()
    assert expected.tolist() != logits.argmax(-1).tolist()


def test_presence_and_frequency_count_the_output_only() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.5, 0.0]])
    greedy = {"temperature": 0.0, "prompt": (0, 0, 0)}
    assert sample(logits, request(**greedy, frequency_penalty=2.0)) == [0]
    assert sample(logits, request(**greedy, output=(0,), frequency_penalty=0.9)) == [0]
    assert sample(logits, request(**greedy, output=(0, 0), frequency_penalty=0.9)) == [1]
    assert sample(logits, request(**greedy, output=(0, 0), presence_penalty=0.9)) == [0]
    assert sample(logits, request(**greedy, output=(0, 0, 1), presence_penalty=1.1, frequency_penalty=0.3)) == [2]
    assert sample(logits, request(**greedy, output=(2,), presence_penalty=-1.6)) == [2]


def test_min_tokens_bans_what_would_end_the_output() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0, 8.0]])
    banned = {"temperature": 0.0, "min_tokens": 2, "stop_token_ids": (4, 7000)}
    assert sample(logits, request(output=(1,), **banned)) == [2]
    assert sample(logits, request(output=(1, 1), **banned)) == [EOS]
    assert sample(logits, request(output=(1,), ignore_eos=True, **banned)) == [EOS], "eos ends nothing then"
    drawn = frequencies(logits, min_tokens=1, stop_token_ids=(4, 3))
    assert drawn[3:].tolist() == [0, 0]


def test_preparing_runs_every_kernel_with_and_without_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[torch.dtype, list[bool]]] = []
    draw = sampler.sampling.sample

    def recorded(logits: torch.Tensor, *parameters: torch.Tensor | None) -> torch.Tensor:
        given.append((logits.dtype, [parameter is not None for parameter in parameters]))
        return draw(logits, *parameters)

    monkeypatch.setattr(sampler.sampling, "sample", recorded)
    Sampler([EOS]).prepare(50, torch.bfloat16, torch.device("cpu"))
    for dtype in (torch.bfloat16, torch.float32):  # as the model says them, and penalized
        temperature, top_k, top_p, min_p, number = zip(*(each for kind, each in given if kind == dtype), strict=True)
        assert temperature == number == (False, True, True, True)
        assert top_k == top_p == (False, False, True, False)
        assert min_p == (False, False, False, True)


def test_a_mixed_batch_keeps_its_order() -> None:
    logits = torch.full((4, 10), -1e9)
    for row in range(4):
        logits[row, 2 * row] = 1e3
    requests = [request(temperature=temperature) for temperature in (0.0, 1.0, 0.0, 0.5)]
    assert sample(logits, *requests) == [0, 2, 4, 6]


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e4])
def test_extreme_temperatures_stay_in_the_vocabulary(temperature: float) -> None:
    logits = torch.tensor([[-3e38, 1.0, 2.0, 3e38, 0.0]])
    expected = [EOS] if temperature < 1 else list(range(5))
    assert sample(logits, request(temperature=temperature))[0] in expected


def test_a_broken_row_neither_raises_nor_reaches_its_neighbours() -> None:
    logits = torch.stack([torch.full((8,), float("nan")), torch.arange(8.0)])
    broken, fine = sample(logits, request(seed=1, top_p=0.5), request(seed=2, top_p=0.5))
    assert 0 <= broken < 8
    assert fine == sample(logits[1:], request(seed=2, top_p=0.5))[0]


def test_log_probabilities_are_of_the_unmodified_logits() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(4))
    ids = torch.tensor([5, 0, 19])
    expected = logits.log_softmax(-1)
    entries = Logprobs.of(logits, ids, [4, 0, 2], range(3)).entries()
    assert [entry.token_id for entry in entries] == [5, 0, 19]
    assert [entry.logprob for entry in entries] == pytest.approx(expected[range(3), ids].tolist(), abs=1e-6)
    assert [len(entry.top) for entry in entries] == [4, 0, 2]
    best = expected[0].topk(4)
    assert [token for token, _ in entries[0].top] == best.indices.tolist()
    assert [value for _, value in entries[0].top] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_more_alternatives_than_the_vocabulary_has() -> None:
    assert len(Logprobs.of(torch.zeros(1, 3), torch.tensor([1]), [20], [0]).entries()[0].top) == 3

"""Steps that yield several tokens, with real models: the same tokens and log-probabilities as one at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.drafts import Drafter
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import GenerateRequest, Key, Sampling, TokenLogprob
from tests.unit.test_model_plugins import PLUGIN, write_toy
from tests.unit.tiny_models import VOCAB_SIZE, args, random_prompts, save

LENGTHS = (1, 9, 30, 17, 4, 25, 6)
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.1, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 2},
    {"temperature": 0.8, "presence_penalty": 0.6, "frequency_penalty": 0.3},
    {"temperature": 1.0, "min_tokens": 9, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 3))},
    {"temperature": 0.9, "top_k": 30, "logprobs": 3},
    {"temperature": 0.0, "stop_token_ids": tuple(range(0, VOCAB_SIZE, 9)), "frequency_penalty": 0.5},
]
Said = list[tuple[list[int], list[TokenLogprob], str]]


class Prompter:
    """A drafter that knows how all `texts` go on, and errs after some tokens."""

    def __init__(self, texts: Sequence[list[int]], num_right: Callable[[int], int]) -> None:
        self._texts = texts
        self._num_right = num_right

    def propose(self, token_ids: Sequence[int], max_drafts: int) -> list[int]:
        known = len(token_ids)
        for text in self._texts:
            if text[:known] == token_ids:
                drafts = text[known : known + max_drafts]
                right = self._num_right(len(drafts))
                return [token if at < right else (token + 1) % VOCAB_SIZE for at, token in enumerate(drafts)]
        return []


def requests() -> list[GenerateRequest]:
    return [
        GenerateRequest(
            key=Key(str(number), 0),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=Sampling(**{"seed": number, "max_tokens": 20, "ignore_eos": True, **sampling}),
            timeout_s=60,
            phase="both",
        )
        for number, (prompt, sampling) in enumerate(zip(random_prompts(LENGTHS), SAMPLINGS, strict=True))
    ]


def answer(runner: ModelRunner, drafter: Drafter | None, overlap: bool) -> tuple[Said, int]:
    """What `runner` says to all requests, which arrive one a step, and in how many steps."""
    runner.is_asynchronous = True
    engine = Engine(runner, EngineOptions(overlap=overlap, drafter=drafter, max_drafts=4))
    asked = requests()
    said: Said = [([], [], "") for _ in asked]
    waiting = list(asked)
    while waiting or engine.has_work:
        if waiting:
            engine.submit(waiting.pop(0))
        frame = engine.step()
        for delta in frame.deltas:
            tokens, logprobs, _ = said[int(delta.key.request_id)]
            tokens += delta.token_ids
            logprobs += delta.logprobs or []
        for finished in frame.finished:
            at = int(finished.key.request_id)
            said[at] = (*said[at][:2], finished.reason)
    engine.check()
    assert engine.is_idle
    return said, engine.stats().steps


def texts(said: Said) -> list[list[int]]:
    return [[*asked.token_ids, *tokens] for asked, (tokens, _, _) in zip(requests(), said, strict=True)]


def check_equal(said: Said, expected: Said) -> None:
    for (tokens, logprobs, reason), (as_alone, scored, end) in zip(said, expected, strict=True):
        assert (tokens, reason) == (as_alone, end)
        assert [entry.token_id for entry in logprobs] == [entry.token_id for entry in scored]
        assert [entry.logprob for entry in logprobs] == pytest.approx([e.logprob for e in scored], abs=1e-4)
        assert [len(entry.top) for entry in logprobs] == [len(entry.top) for entry in scored]


@contextmanager
def closed(runner: ModelRunner) -> Iterator[ModelRunner]:
    try:
        yield runner
    finally:
        runner.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save("llama", folder)
    return folder


@pytest.mark.parametrize("overlap", [False, True], ids=["in turn", "overlapped"])
def test_drafts_change_neither_tokens_nor_log_probabilities(folder: Path, overlap: bool) -> None:
    runner = ModelRunner(args(folder, num_threads=1))
    expected, num_steps = answer(runner, None, overlap)
    assert {end for _, _, end in expected} == {"stop", "length"}
    chance = random.Random(0)
    rights: list[Callable[[int], int]] = [lambda _: 0, lambda most: most, lambda most: chance.randint(0, most)]
    counts = []
    for num_right in rights:
        said, steps = answer(runner, Prompter(texts(expected), num_right), overlap)
        check_equal(said, expected)
        counts.append(steps)
    assert counts[1] < counts[2] < counts[0] <= num_steps + 1
    assert counts[1] < num_steps / 2


def test_drafts_change_nothing_where_layers_have_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)
    write_toy(tmp_path)
    runner = ModelRunner(args(tmp_path, num_threads=1))
    assert len(runner.pools) == 2
    expected, num_steps = answer(runner, None, True)
    chance = random.Random(0)
    said, steps = answer(runner, Prompter(texts(expected), lambda most: chance.randint(0, most)), True)
    check_equal(said, expected)
    assert steps < num_steps


def test_drafts_change_nothing_over_two_ranks(folder: Path) -> None:
    expected, num_steps = answer(ModelRunner(args(folder, num_threads=1)), None, True)
    with closed(ModelRunner(args(folder, num_threads=1, tensor_parallel_size=2))) as runner:
        said, steps = answer(runner, Prompter(texts(expected), lambda most: most // 2 + 1), True)
    check_equal(said, expected)
    assert steps < num_steps

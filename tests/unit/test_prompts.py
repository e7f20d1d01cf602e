"""What the Python API takes for a prompt, what it says of anything else, and that no caller ends its engine."""

from __future__ import annotations

import asyncio
import logging
import threading
from array import array
from typing import Any

import pytest

from pdserve.engine.hosts.background import BackgroundEngine
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import EngineError, RequestError, from_info
from pdserve.generation import Generation
from pdserve.llm import SamplingParams
from pdserve.protocol import Finished, TokenDelta
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output
from tests.unit.engine_bench import PROMPT, request
from tests.unit.test_llm import LIMITS, TOKENIZER, Bench, bench, greedy

__all__ = ["bench"]

TIMEOUT_S = 60.0
IDS = TOKENIZER.encode_now("abc")
PARAMS = SamplingParams(max_tokens=4, seed=3)


def expected(token_ids: list[int]) -> list[int]:
    return expected_output(token_ids, greedy(4, 3), LIMITS)[0]


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ("abc", "abc"),
        (IDS, None),
        (tuple(IDS), None),
        (array("i", IDS), None),
        ({"prompt": "abc"}, "abc"),
        ({"prompt_token_ids": IDS}, None),
        ({"prompt": "abc", "prompt_token_ids": IDS}, "abc"),
        ({"prompt": "abc", "prompt_token_ids": None}, "abc"),
    ],
)
def test_every_form_of_a_prompt_alone_in_a_list_and_streamed(bench: Bench, inputs: Any, text: str | None) -> None:
    llm = bench.make()
    alone = llm.generate(inputs, PARAMS)
    assert (alone.prompt, alone.prompt_token_ids, alone.outputs[0].token_ids) == (text, IDS, expected(IDS))
    assert llm.generate([inputs, "other"], PARAMS)[0] == alone
    assert llm.generate_async(inputs, PARAMS).result(TIMEOUT_S) == alone


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([[1.0]], r"inputs\[0\]\[0\]: expected a token id, got 1.0"),
        ([[5, None]], r"inputs\[0\]\[1\]: expected a token id, got None"),
        ([[5], [True]], r"inputs\[1\]\[0\]: expected a token id, got True"),
        ([5, "a"], r"inputs\[1\]: expected a token id, got 'a'"),
        (["a", 5], r"inputs\[1\]: expected text, a list of token ids, .*, got 5"),
        ([None], r"inputs\[0\]: expected text, a list of token ids, .*, got None"),
        ([1.5], r"inputs\[0\]: expected text"),
        ([[]], r"inputs\[0\]: the prompt is empty"),
        ([b"abc"], r"inputs\[0\]: expected text"),
        ([{}], r"inputs\[0\]: expected .*; it has neither"),
        ([{"prompt": None}], r"inputs\[0\]: expected .*; it has neither"),
        ([{"promt": "a"}], r"inputs\[0\]: expected .*; 'promt' is unknown"),
        ([{"prompt": 5}], r"inputs\[0\].prompt: expected text, got 5"),
        ([{"prompt_token_ids": "a"}], r"inputs\[0\].prompt_token_ids: expected token ids, got 'a'"),
        ([{"prompt_token_ids": [[5]]}], r"inputs\[0\].prompt_token_ids\[0\]: expected a token id"),
        ([{"prompt": "a", "multi_modal_data": {}}], "'multi_modal_data' is unknown"),
        (None, "inputs: expected text"),
        (5, "inputs: expected text"),
        ({"prompt": ["a"]}, "inputs.prompt: expected text"),
        (iter(["a"]), "inputs: expected text"),
        ("a\ud800", "inputs: character 1 is not valid Unicode"),
        (["b", "\ud800"], r"inputs\[1\]: character 0 is not valid Unicode"),
        ([[-1]], "token id -1 is not in the vocabulary"),
        ([[2**70]], "token id .* is not in the vocabulary"),
    ],
)
def test_anything_else_is_refused_and_leaves_nothing_running(bench: Bench, inputs: Any, said: str) -> None:
    llm = bench.make()
    with pytest.raises(RequestError, match=said):
        llm.generate(inputs, PARAMS)
    if not isinstance(inputs, list):
        with pytest.raises(RequestError, match=said):
            llm.generate_async(inputs, PARAMS)
    assert llm.generate([], PARAMS) == []
    assert llm.generate("abc", PARAMS).outputs[0].token_ids == expected(IDS)


def test_nothing_starts_if_one_prompt_of_a_list_has_no_form(bench: Bench) -> None:
    with pytest.raises(RequestError, match=r"inputs\[1\]"):
        bench.make().generate(["abc", {"prompt": 5}], PARAMS)  # type: ignore[list-item]
    assert bench.runner.batches == 0


def test_one_refused_prompt_aborts_the_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = bench.make()
    aborted: set[str] = set()
    abort = llm._engine.abort
    monkeypatch.setattr(llm._engine, "abort", lambda key: (aborted.add(key.request_id), abort(key)))
    with pytest.raises(RequestError, match="vocabulary"):
        llm.generate([[300], *[[5, index] for index in range(8)]], SamplingParams(max_tokens=50, seed=3))
    assert aborted == {f"llm-{number}-0" for number in range(9)}
    assert llm.generate("abc", PARAMS).outputs[0].token_ids == expected(IDS)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, [PARAMS, None], 5, "greedy"])
def test_sampling_params_of_another_type_are_refused(bench: Bench, params: Any) -> None:
    llm = bench.make()
    with pytest.raises(RequestError, match="sampling_params: expected SamplingParams"):
        llm.generate(["a", "b"], params)
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate_async("a", params)


def test_min_tokens_above_max_tokens_is_refused_at_once() -> None:
    with pytest.raises(RequestError, match="min_tokens, 4, is more than max_tokens, 3"):
        SamplingParams(max_tokens=3, min_tokens=4)


@pytest.mark.parametrize("stop_token_ids", [[-1], [256], [2**70]])
def test_stop_tokens_outside_the_vocabulary_fail_their_own_request(bench: Bench, stop_token_ids: list[int]) -> None:
    llm = bench.make()
    beside = llm.generate_async("abc", SamplingParams(max_tokens=30, seed=3))
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate("abc", SamplingParams(max_tokens=4, min_tokens=2, stop_token_ids=stop_token_ids))
    assert len(beside.result(TIMEOUT_S).outputs[0].token_ids) == 30


class Taker:
    """Takes one request's output, and raises at its `raises_at`-th call."""

    def __init__(self, raises_at: int) -> None:
        self.calls: list[tuple[TokenDelta | None, Finished | None]] = []
        self.ended = threading.Event()
        self._raises_at = raises_at

    def __call__(self, delta: TokenDelta | None, finished: Finished | None) -> None:
        self.calls.append((delta, finished))
        if finished is not None:
            self.ended.set()
        if len(self.calls) >= self._raises_at:
            raise ValueError("a caller's mistake")

    def tokens(self) -> list[int]:
        return [token for delta, _ in self.calls if delta is not None for token in delta.token_ids]


@pytest.mark.parametrize("raises_at", [1, 3, 6])
def test_a_callback_that_raises_ends_its_own_request(raises_at: int, caplog: pytest.LogCaptureFixture) -> None:
    """At the first token, in the middle, with the end."""
    runner = FakeRunner()
    engine = BackgroundEngine(lambda wake: Engine(runner, wake=wake))
    raising, beside, later = Taker(raises_at), Taker(100), Taker(100)
    with caplog.at_level(logging.ERROR):
        engine.submit(request("beside", max_tokens=30), beside)
        engine.submit(request("raising", max_tokens=6), raising)
        assert beside.ended.wait(TIMEOUT_S)
    engine.submit(request("later"), later)
    assert later.ended.wait(TIMEOUT_S)
    engine.close()
    assert beside.tokens() == expected_output(PROMPT, request(max_tokens=30).sampling, SMALL_LIMITS)[0]
    assert later.tokens() == expected_output(PROMPT, request().sampling, SMALL_LIMITS)[0]
    assert len([each for each in caplog.records if each.levelno == logging.ERROR]) == 1
    _, finished = raising.calls[-1]
    assert len(raising.calls) == raises_at + 1
    assert finished is not None
    assert finished.error is not None
    assert isinstance(from_info(finished.error), EngineError)


def test_text_that_can_not_be_made_fails_its_own_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = bench.make()
    take = Generation._take

    def failing(self: Generation, index: int, delta: TokenDelta | None, finished: Finished | None) -> None:
        if self._prompt == "bad" and delta is not None and delta.start > 2:
            raise ValueError("no such token")
        take(self, index, delta, finished)

    monkeypatch.setattr(Generation, "_take", failing)
    bad = llm.generate_async("bad", SamplingParams(max_tokens=20))
    good = llm.generate_async("abc", PARAMS)
    with pytest.raises(EngineError):
        bad.result(TIMEOUT_S)
    assert good.result(TIMEOUT_S).outputs[0].token_ids == expected(IDS)


def test_a_loop_that_is_closed_while_its_stream_is_open_harms_nobody(bench: Bench) -> None:
    llm = bench.make()
    generation = llm.generate_async("abc", SamplingParams(max_tokens=50, seed=3))

    async def begin() -> None:
        generation._waiter = (asyncio.get_running_loop(), asyncio.Event())

    asyncio.run(begin())
    assert len(generation.result(TIMEOUT_S).outputs[0].token_ids) == 50
    assert llm.generate("abc", PARAMS).outputs[0].token_ids == expected(IDS)

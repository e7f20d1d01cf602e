"""A step that fails ends the request it is due to, and no other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.isolation import MAX_UNEXPLAINED_FAILURES
from pdserve.protocol import Key
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output
from tests.unit.engine_bench import Client, make, overlap_of_steps, request, run
from tests.unit.test_engine_handoff import Pair, make_request
from tests.unit.tiny_models import args, random_prompts, save

__all__ = ["overlap_of_steps"]

NAMES = "abcdefgh"
PROMPTS = {name: [10 + index, 3, 4, 5, 6 + index % 3] for index, name in enumerate(NAMES)}


def make_bad(runner: FakeRunner, names: Collection[str], *, late: bool, from_position: int = 0) -> None:
    """Each step fails that has one of `names` in it, at `from_position` or later."""
    firsts = {PROMPTS[name][0] for name in names}
    runner.is_bad = lambda item: item.prompt_ids[0] in firsts and item.start >= from_position
    runner.fails_late = late


def check_healthy(engine: Engine, client: Client, bad: Collection[str]) -> None:
    for name, prompt in PROMPTS.items():
        tokens, reason = expected_output(prompt, request(max_tokens=9).sampling, SMALL_LIMITS)
        error = client.end(name).error
        if name in bad:
            assert error is not None
            assert (error.code, client.end(name).reason) == ("engine_error", "error")
            assert client.tokens(name) == tokens[: len(client.tokens(name))]
        else:
            assert (error, client.tokens(name), client.end(name).reason) == (None, tokens, reason)
    assert engine.failure is None
    assert engine.stats().blocks.available == SMALL_LIMITS.num_blocks
    engine.check()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("from_position", [0, 4, 8])
@pytest.mark.parametrize("bad", ["a", "d", "h", "ae", "bcdfgh", NAMES])
def test_only_the_bad_rows_of_a_batch_fail(bad: str, from_position: int, late: bool) -> None:
    engine, runner = make()
    make_bad(runner, bad, late=late, from_position=from_position)
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, max_tokens=9))
    check_healthy(engine, run(engine), bad)
    assert not runner.mistakes


def test_one_bad_row_costs_a_few_small_steps() -> None:
    engine, runner = make()
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, max_tokens=9))
    run(engine)
    healthy_steps = runner.batches
    engine, runner = make()
    make_bad(runner, "c", late=True, from_position=5)
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, max_tokens=9))
    client = run(engine)
    check_healthy(engine, client, "c")
    assert runner.batches <= healthy_steps + 9, "eight rows are halved three times"


@pytest.mark.parametrize("late", [False, True])
def test_bad_requests_in_a_row_never_end_the_engine(late: bool) -> None:
    engine, runner = make()
    make_bad(runner, "b", late=late)
    for attempt in range(3 * MAX_UNEXPLAINED_FAILURES):
        engine.submit(request("b", PROMPTS["b"], attempt=attempt))
        assert run(engine).end("b", attempt).reason == "error"
    engine.submit(request("a", PROMPTS["a"], max_tokens=9))
    assert run(engine).tokens("a") == expected_output(PROMPTS["a"], request(max_tokens=9).sampling, SMALL_LIMITS)[0]
    assert engine.failure is None


def test_steps_that_fail_whoever_is_in_them_end_the_engine() -> None:
    engine, runner = make()
    launch = runner.launch

    def failing(items: Sequence[BatchItem], copies: Sequence[BlockCopy]) -> LaunchedStep:
        if len(items) > 4:
            raise RuntimeError("too many rows at once")
        return launch(items, copies)

    runner.launch = failing  # type: ignore[method-assign]
    for name, prompt in PROMPTS.items():
        engine.submit(request(name, prompt, max_tokens=9))
    client = run(engine)
    assert engine.failure is not None
    assert {client.end(name).reason for name in NAMES} == {"error"}


def test_the_device_has_come_to_rest_before_the_blocks_of_a_failed_step_are_free() -> None:
    engine, runner = make()
    make_bad(runner, "a", late=False)
    used: list[int] = []
    probe = runner.probe
    runner.probe = lambda: (used.append(engine.stats().blocks.used), probe())[1]  # type: ignore[method-assign]
    engine.submit(request("a", PROMPTS["a"]))
    run(engine)
    assert used == [2]
    assert engine.stats().blocks.used == 0


@pytest.mark.parametrize("late", [False, True])
def test_a_row_whose_prefix_was_to_be_copied_in_the_failed_step_computes_it(late: bool) -> None:
    engine, runner = make()
    shared = list(range(20, 30))
    engine.submit(request("before", [*shared, 7], max_tokens=2))
    run(engine)
    make_bad(runner, "b", late=late)
    engine.submit(request("healthy", [*shared, 8], max_tokens=6))
    engine.submit(request("b", PROMPTS["b"]))
    client = run(engine)
    tokens, _ = expected_output([*shared, 8], request(max_tokens=6).sampling, SMALL_LIMITS)
    assert client.tokens("healthy") == tokens
    assert client.end("healthy").usage.cached_tokens == 8, "two whole blocks; the copied part was computed again"
    assert client.end("b").reason == "error"
    assert not runner.mistakes
    engine.check()


@pytest.mark.parametrize("late", [False, True])
def test_handoffs_survive_a_bad_row_on_either_side(late: bool) -> None:
    pair = Pair()
    make_bad(pair.link.source, "b", late=late)
    make_bad(pair.link.target, "d", late=late)
    for name in "abcde":
        pair.submit(make_request(name, PROMPTS[name], max_tokens=5))
    pair.settle()
    for name in "ace":
        expected, _ = expected_output(PROMPTS[name], make_request(max_tokens=5).sampling, SMALL_LIMITS)
        assert pair.tokens(Key(name, 0)) == expected
        assert pair.reasons(Key(name, 0)) == ("handoff", "length")
    assert pair.reasons(Key("b", 0)) == ("error", "error")
    assert pair.reasons(Key("d", 0)) == ("handoff", "error")
    assert pair.context.failure is None
    assert pair.generation.failure is None
    pair.check_at_rest()


def test_an_import_is_told_to_the_mover_though_the_step_beside_it_can_not_be_launched() -> None:
    pair = Pair()
    make_bad(pair.link.target, "b", late=False)
    pair.generation.submit(make_request("b", PROMPTS["b"]))
    pair.submit(make_request("a", PROMPTS["a"], max_tokens=5))
    pair.settle()
    assert pair.reasons(Key("a", 0)) == ("handoff", "length")
    assert pair.generation_client.end("b").reason == "error"
    pair.check_at_rest()


class Model:
    """A small real model whose sampler fails on rows with a `frequency_penalty` of 1."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save("llama", folder)
        self.runner = ModelRunner(args(folder, num_threads=1))
        sample = self.runner._sampler.sample

        def failing(logits: torch.Tensor, requests: Sequence[Any]) -> torch.Tensor:
            tokens = sample(logits, requests)
            if any(each.sampling.frequency_penalty == 1.0 for each in requests):
                raise RuntimeError("a failing row")
            return tokens

        monkeypatch.setattr(self.runner._sampler, "sample", failing)


def test_rows_beside_one_that_can_not_be_sampled_get_the_tokens_that_they_get_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Model(tmp_path, monkeypatch).runner
    kinds: list[dict[str, Any]] = [{"temperature": 0.0}, {"repetition_penalty": 1.7}, {"top_p": 0.8, "logprobs": 2}]
    asked = [
        request(str(number), prompt, max_tokens=8, **kinds[number % 3])
        for number, prompt in enumerate(random_prompts([5, 9, 3, 12, 6, 7]))
    ]
    seen = []
    for bad in ([], [request("bad", [5, 6, 7], frequency_penalty=1.0)]):
        engine, client = Engine(runner), Client()
        for each in (*asked[:3], *bad, *asked[3:]):
            engine.submit(each)
        run(engine, client)
        engine.check()
        assert engine.failure is None
        assert [client.finished[each.key].reason for each in bad] == ["error"] * len(bad)
        seen.append([client.tokens(each.key.request_id) for each in asked])
    assert seen[0] == seen[1]


def test_a_probe_writes_to_no_cache(tmp_path: Path) -> None:
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path, num_threads=1))
    runner.pool.tensor.fill_(0.5)
    runner.probe()
    assert bool((runner.pool.tensor == 0.5).all())

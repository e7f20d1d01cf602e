"""The engine's steps with a fake model: overlap, failures, preemption, company, what is told when."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pdserve.engine.schedule.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.protocol import Key
from tests.fakes.fake_runner import SMALL_LIMITS, expected_output, fake_logprob
from tests.unit.engine_bench import PROMPT, Client, Clock, error_of, make, overlap_of_steps, request, run

__all__ = ["overlap_of_steps"]


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on() -> None:
    engine, runner = make(max_batch_size=1)
    runner.failures = [RuntimeError("boom")]
    engine.submit(request("a"))
    engine.submit(request("b"))
    client = run(engine)
    error = client.end("a").error
    assert error is not None
    assert (error.code, error.retryable) == ("engine_error", True)
    assert "boom" not in error.message
    assert client.end("b").reason == "length"
    assert engine.failure is None
    engine.check()


def test_steps_that_fail_in_a_row_end_everything() -> None:
    engine, runner = make(max_batch_size=1)
    runner.is_dead = True
    for name in "abcde":
        engine.submit(request(name))
    client = run(engine)
    assert engine.failure is not None
    assert {name: client.end(name).reason for name in "abcde"} == dict.fromkeys("abcde", "error")
    assert error_of(engine, request("late"))[0] == "engine_error"


def test_a_step_that_fails_on_the_device_ends_its_requests_and_the_engine_goes_on() -> None:
    engine, runner = make(max_batch_size=1)
    runner.late_failures = [RuntimeError("boom")]
    engine.submit(request("a"))
    engine.submit(request("b"))
    client = run(engine)
    assert (client.end("a").reason, client.end("b").reason) == ("error", "length")
    assert engine.failure is None
    engine.check()
    assert engine.stats().blocks.available == SMALL_LIMITS.num_blocks


@pytest.mark.parametrize("end", ["stop", "abort"])
def test_blocks_of_an_ended_request_wait_for_the_step_that_still_writes_to_them(end: str) -> None:
    tokens, _ = expected_output(PROMPT, request(max_tokens=20).sampling, SMALL_LIMITS)
    engine, _ = make(overlap=True, enable_block_reuse=False)
    engine.submit(request(max_tokens=20, stop_token_ids=(tokens[3],) if end == "stop" else ()))
    client = Client()
    while len(client.tokens()) < 4:
        client.take(engine.step())
    if end == "abort":
        engine.abort(Key("r", 0))
    assert engine.stats().blocks.used == 3
    assert not engine.is_idle
    client.take(engine.step())
    assert (client.end().reason, client.tokens()) == (end, tokens[:4])
    assert engine.stats().blocks.used == 0
    assert engine.is_idle
    engine.check()


def test_the_next_step_is_launched_before_the_last_one_is_looked_at() -> None:
    engine, runner = make(overlap=True)
    engine.submit(request(max_tokens=3))
    launched_at_collection: list[int] = []
    launch, count = runner.launch, 0

    def counting(items: Sequence[BatchItem], copies: Sequence[BlockCopy]) -> LaunchedStep:
        nonlocal count
        count += 1
        step = launch(items, copies)
        results = step.results
        step.results = lambda: [launched_at_collection.append(count), results()][1]  # type: ignore[method-assign]
        return step

    runner.launch = counting  # type: ignore[method-assign]
    assert run(engine).end().reason == "length"
    assert launched_at_collection == [2, 3, 3], "and no step is launched whose tokens nobody may use"


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_penalty_waits_for_the_token_before(penalty: str) -> None:
    engine, runner = make(overlap=True)
    engine.submit(request("plain"))
    engine.submit(request("penalized", **{penalty: 1.5}))
    seen: list[BatchItem] = []
    launch = runner.launch
    runner.launch = lambda items, copies: (seen.extend(items), launch(items, copies))[1]  # type: ignore[method-assign]
    client = run(engine)
    assert {client.end(name).reason for name in ("plain", "penalized")} == {"length"}
    waiting = [item for item in seen if getattr(item.sampling, penalty) == 1.5]
    assert len(waiting) == 6
    assert all(item.previous is None for item in waiting)


def test_preempted_requests_still_get_their_exact_tokens() -> None:
    engine, _ = make(num_blocks=8, enable_block_reuse=False, capacity_policy="MAX_UTILIZATION")
    prompts = {name: [index + 2] * 6 for index, name in enumerate("abcd")}
    for name, prompt in prompts.items():
        engine.submit(request(name, prompt, max_tokens=20))
    client = run(engine)
    assert engine.stats().preemptions > 0
    for name, prompt in prompts.items():
        expected, _ = expected_output(prompt, request(max_tokens=20).sampling, SMALL_LIMITS)
        assert client.tokens(name) == expected
    engine.check()


def test_without_preemption_requests_wait_for_blocks_for_all_of_their_output() -> None:
    engine, runner = make(num_blocks=8, enable_block_reuse=False, capacity_policy="GUARANTEED_NO_EVICT")
    for name in "abcd":
        engine.submit(request(name, [2] * 6, max_tokens=10))
    client = run(engine)
    assert engine.stats().preemptions == 0
    assert max(len(step) for step in runner.history) == 2, "four blocks each"
    assert [len(client.tokens(name)) for name in "abcd"] == [10] * 4
    engine.check()


def test_an_evicted_prefix_comes_back_from_the_host() -> None:
    engine, runner = make(num_blocks=5, host_blocks=8)
    prompt = list(range(2, 16))
    for name, token_ids in (("a", prompt), ("other", [20] * 17), ("b", prompt)):
        engine.submit(request(name, token_ids, max_tokens=2))
        client = run(engine)
    assert client.end("b").usage.cached_tokens == 12
    assert client.tokens("b") == expected_output(prompt, request(max_tokens=2).sampling, SMALL_LIMITS)[0]
    stats = engine.stats()
    assert stats.onboarded_blocks == 3
    assert stats.offloaded_blocks == stats.host_blocks_used > 3
    assert stats.host_blocks == 8
    assert not runner.mistakes
    engine.check()


def test_what_a_request_has_said_is_reused_by_the_one_that_continues_it() -> None:
    engine, runner = make()
    engine.submit(request("first", max_tokens=6))
    said = run(engine).tokens("first")
    engine.submit(request("second", PROMPT + said + [3, 4], max_tokens=2))
    client = run(engine)
    assert client.end("second").usage.cached_tokens == len(PROMPT) + len(said) - 1
    assert not runner.mistakes


def test_tokens_go_out_in_intervals_but_the_first_and_the_last_at_once() -> None:
    engine, _ = make(stream_interval=3)
    engine.submit(request(max_tokens=9, logprobs=0, prompt_logprobs=0))
    client = run(engine)
    deltas = client.deltas[Key("r", 0)]
    assert [len(delta.token_ids) for delta in deltas] == [1, 3, 3, 2]
    tokens, _ = expected_output(PROMPT, request(max_tokens=9).sampling, SMALL_LIMITS)
    assert client.tokens() == tokens
    assert [entry for delta in deltas for entry in delta.logprobs or ()] == list(map(fake_logprob, tokens))
    assert [delta.prompt_logprobs is None for delta in deltas] == [False, True, True, True]


def test_an_aborted_request_gets_the_tokens_it_was_not_told_yet() -> None:
    engine, _ = make(stream_interval=50)
    engine.submit(request(max_tokens=40))
    client = Client()
    for _ in range(6):
        client.take(engine.step())
    assert len(client.tokens()) == 1
    engine.abort(Key("r", 0))
    run(engine, client)
    assert client.end().reason == "abort"
    assert len(client.tokens()) == client.end().usage.completion_tokens > 1


def test_prompts_wait_for_company_only_while_nothing_runs_and_the_host_sleeps_meanwhile() -> None:
    clock = Clock()
    engine, runner = make(clock=clock, batch_wait_s=5, max_batch_size=3)
    engine.submit(request("a", max_tokens=30))
    run(engine)
    clock.now_s += 3
    engine.submit(request("b", max_tokens=30))
    run(engine)
    assert (runner.batches, engine.has_work, engine.seconds_to_deadline()) == (0, False, 2)
    clock.now_s += 2
    assert engine.has_work
    client = Client()
    while not client.tokens("b"):
        client.take(engine.step())
    assert runner.history[0] == [(0, 5), (0, 5)] or runner.history[0] == [(0, 5), (4, 1)]
    engine.submit(request("c", max_tokens=2))
    run(engine, client)
    assert set(client.finished) == {Key(name, 0) for name in "abc"}
    batches = runner.batches
    for name in "def":
        engine.submit(request(name, max_tokens=1))
    assert len(run(engine).finished) == 3
    assert runner.batches > batches, "a full batch does not wait"


def test_an_abort_ends_the_wait_for_company() -> None:
    engine, _ = make(clock=Clock(), batch_wait_s=5)
    engine.submit(request())
    run(engine)
    engine.abort(Key("r", 0))
    assert run(engine).end().reason == "abort"
    assert engine.seconds_to_deadline() is None

"""The engine with a fake model: every kind of end, every refusal, timings, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from pdserve.engine.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.engine.engine import MAX_FAILED_STEPS, Engine
from pdserve.engine.options import EngineOptions
from pdserve.errors import TransferError
from pdserve.handoff import ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Finished, GenerateRequest, Key, OutputFrame, Phase, Sampling, TokenDelta
from tests.fakes.fake_link import PEER, FakeLink
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output, fake_logprob

PROMPT = [5, 6, 7, 8, 9]


_overlap = False


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "overlapped"])
def _overlap_of_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every engine that `make` builds runs its steps in turn, then overlapped."""
    global _overlap
    _overlap = request.param
    yield
    _overlap = False


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def request(
    name: str = "r",
    token_ids: list[int] | None = None,
    *,
    attempt: int = 0,
    phase: Phase = "both",
    num_prompt_tokens: int | None = None,
    timeout_s: float = 60.0,
    salt: str = "",
    **sampling: Any,
) -> GenerateRequest:
    token_ids = PROMPT if token_ids is None else token_ids
    return GenerateRequest(
        key=Key(name, attempt),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        sampling=Sampling(**{"seed": 1, "max_tokens": 6, "ignore_eos": True, **sampling}),
        timeout_s=timeout_s,
        phase=phase,
        peer=PEER if phase != "both" else None,
        cache_salt=salt,
    )


class Client:
    """Collects what an engine says; fails on gaps in a stream or on words after the end."""

    def __init__(self) -> None:
        self.deltas: dict[Key, list[TokenDelta]] = {}
        self.finished: dict[Key, Finished] = {}

    def take(self, frame: OutputFrame) -> None:
        for delta in frame.deltas:
            assert delta.key not in self.finished
            before = self.deltas.setdefault(delta.key, [])
            assert not before or delta.start == before[-1].start + len(before[-1].token_ids)
            before.append(delta)
        for finished in frame.finished:
            assert finished.key not in self.finished, "a second end"
            self.finished[finished.key] = finished

    def tokens(self, name: str = "r", attempt: int = 0) -> list[int]:
        return [token for delta in self.deltas.get(Key(name, attempt), []) for token in delta.token_ids]

    def end(self, name: str = "r", attempt: int = 0) -> Finished:
        return self.finished[Key(name, attempt)]


def run(engine: Engine, client: Client | None = None) -> Client:
    client = client or Client()
    for _ in range(1000):
        if not engine.has_work:
            return client
        client.take(engine.step())
    raise AssertionError("the engine never came to rest")


def make(**settings: Any) -> tuple[Engine, FakeRunner]:
    """An engine; `settings` are fields of its limits, of its options, or arguments of its own."""
    limits = {key: settings.pop(key) for key in list(settings) if key in SMALL_LIMITS.__struct_fields__}
    runner = FakeRunner(msgspec.structs.replace(SMALL_LIMITS, **limits), num_host_blocks=settings.pop("host_blocks", 0))
    options = {key: settings.pop(key) for key in list(settings) if key in EngineOptions.__dataclass_fields__}
    return Engine(runner, EngineOptions(**{"overlap": _overlap, **options}), **settings), runner


def error_of(engine: Engine, bad: GenerateRequest) -> tuple[str, str | None]:
    engine.submit(bad)
    end = run(engine).finished[bad.key]
    assert end.reason == "error"
    assert end.error is not None
    engine.check()
    assert engine.is_idle
    return end.error.code, end.error.param


def test_a_request_gets_the_models_tokens_and_its_usage() -> None:
    engine, _ = make()
    engine.submit(request())
    client = run(engine)
    assert (client.tokens(), client.end().reason) == expected_output(PROMPT, request().sampling, SMALL_LIMITS)
    assert msgspec.structs.astuple(client.end().usage) == (5, 6, 0)
    assert [delta.start for delta in client.deltas[Key("r", 0)]] == list(range(6))
    assert engine.is_idle
    assert engine.stats().blocks.available == SMALL_LIMITS.num_blocks
    engine.check()


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids"])
def test_a_stop_token_ends_the_output_and_is_part_of_it(kind: str) -> None:
    tokens, _ = expected_output(PROMPT, request(max_tokens=20).sampling, SMALL_LIMITS)
    stop = tokens[3]
    assert stop not in tokens[:3]
    engine, _ = make(eos_token_ids=(stop,) if kind == "eos" else ())
    sampling = {"ignore_eos": False} if kind == "eos" else {"stop_token_ids": (stop,)}
    engine.submit(request(max_tokens=20, **sampling))
    client = run(engine)
    assert client.tokens() == tokens[:4]
    assert client.end().reason == "stop"


def test_min_tokens_postpones_the_stop() -> None:
    engine, runner = make(vocab_size=3, eos_token_ids=(0, 1))
    bad = request(token_ids=[2, 2], min_tokens=5, max_tokens=9, ignore_eos=False)
    engine.submit(bad)
    client = run(engine)
    assert (client.tokens(), client.end().reason) == expected_output([2, 2], bad.sampling, runner.limits)
    assert len(client.tokens()) >= 5


def test_max_seq_len_ends_the_output_with_length() -> None:
    engine, _ = make(max_seq_len=8)
    engine.submit(request(max_tokens=100))
    client = run(engine)
    assert len(client.tokens()) == 3
    assert client.end().reason == "length"


def test_a_pool_smaller_than_max_seq_len_ends_the_output_with_length() -> None:
    engine, _ = make(num_blocks=2)
    engine.submit(request(max_tokens=100))
    client = run(engine)
    assert len(client.tokens()) == 2 * SMALL_LIMITS.tokens_per_block + 1 - len(PROMPT)
    assert client.end().reason == "length"
    engine.check()


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (request(token_ids=[]), "invalid_request", "token_ids"),
        (request(token_ids=[50]), "invalid_request", "token_ids"),
        (request(token_ids=[-1]), "invalid_request", "token_ids"),
        (request(num_prompt_tokens=6), "invalid_request", "num_prompt_tokens"),
        (request(num_prompt_tokens=0), "invalid_request", "num_prompt_tokens"),
        (request(max_tokens=0), "invalid_request", "max_tokens"),
        (request(timeout_s=0), "invalid_request", "timeout_s"),
        (request(timeout_s=float("nan")), "invalid_request", "timeout_s"),
        (request(token_ids=[3] * 64), "limit_exceeded", "max_seq_len"),
        (request(phase="generation"), "invalid_request", "phase"),
        (request(phase="context"), "invalid_request", "peer"),
    ],
)
def test_a_refusal_names_the_field_or_limit(bad: GenerateRequest, code: str, param: str) -> None:
    assert error_of(make()[0], bad) == (code, param)


def test_limits_that_depend_on_the_configuration_are_named() -> None:
    long = request(token_ids=[3] * 33)
    assert error_of(make(num_blocks=8)[0], long) == ("limit_exceeded", "num_blocks")
    assert error_of(make(enable_chunked_prefill=False)[0], long) == ("limit_exceeded", "max_num_tokens")


def test_a_full_queue_is_overload() -> None:
    engine, _ = make(max_queue_size=2)
    for name in "abc":
        engine.submit(request(name))
    client = run(engine)
    refused = client.end("c").error
    assert refused is not None
    assert (refused.code, refused.param, refused.retryable) == ("overloaded", "max_queue_size", True)
    assert client.end("a").reason == client.end("b").reason == "length"


def test_a_newer_attempt_withdraws_the_older_and_fences_it() -> None:
    engine, _ = make()
    client = Client()
    engine.submit(request(attempt=1))
    client.take(engine.step())
    engine.submit(request(attempt=2))
    engine.submit(request(attempt=0))
    engine.abort(Key("r", 1))
    run(engine, client)
    assert client.end(attempt=1).reason == "abort"
    assert client.end(attempt=2).reason == "length"
    stale = client.end(attempt=0).error
    assert stale is not None
    assert stale.code == "aborted"


def test_the_same_attempt_twice_is_refused_also_after_it_has_ended() -> None:
    engine, _ = make()
    engine.submit(request())
    run(engine)
    assert error_of(engine, request()) == ("invalid_request", "key")


def test_a_retry_continues_where_the_earlier_attempt_stopped() -> None:
    engine, _ = make()
    first = request(max_tokens=10, logprobs=0)
    tokens, _ = expected_output(PROMPT, first.sampling, SMALL_LIMITS)
    engine.submit(request(token_ids=PROMPT + tokens[:4], num_prompt_tokens=5, attempt=1, max_tokens=10, logprobs=0))
    client = run(engine)
    deltas = client.deltas[Key("r", 1)]
    assert deltas[0].start == 4
    assert client.tokens(attempt=1) == tokens[4:]
    assert msgspec.structs.astuple(client.end(attempt=1).usage) == (5, 10, 0)
    assert deltas[0].logprobs == [fake_logprob(tokens[4])]


def test_a_retry_of_a_request_that_was_complete_just_ends() -> None:
    engine, runner = make()
    tokens, _ = expected_output(PROMPT, request().sampling, SMALL_LIMITS)
    engine.submit(request(token_ids=PROMPT + tokens, num_prompt_tokens=5))
    assert run(engine).end().reason == "length"
    assert runner.batches == 0


def test_a_shared_prefix_is_reused_and_counted_but_not_across_salts() -> None:
    engine, runner = make()
    prompt = list(range(2, 16))
    for name, salt in (("a", ""), ("b", ""), ("c", "other")):
        engine.submit(request(name, prompt, salt=salt, max_tokens=1))
        client = run(engine)
        assert client.end(name).usage.cached_tokens == (13 if name == "b" else 0)
    assert runner.history == [[(0, 14)], [(13, 1)], [(0, 14)]]
    assert engine.stats().cached_tokens == 13
    assert engine.stats().partially_reused_blocks == 1


def test_prompt_logprobs_come_once_cover_the_prompt_and_suppress_reuse() -> None:
    engine, _ = make(max_num_tokens=4)
    prompt = list(range(2, 16))
    for name in "ab":
        engine.submit(request(name, prompt, prompt_logprobs=0, max_tokens=3))
        client = run(engine)
        deltas = client.deltas[Key(name, 0)]
        assert deltas[0].prompt_logprobs == [None, *map(fake_logprob, prompt[1:])]
        assert [delta.prompt_logprobs for delta in deltas[1:]] == [None, None]
        assert client.end(name).usage.cached_tokens == 0


def test_an_abort_ends_a_request_wherever_it_is_and_unknown_ones_are_ignored() -> None:
    engine, _ = make(max_batch_size=1)
    client = Client()
    engine.submit(request("a", max_tokens=50))
    engine.submit(request("b"))
    client.take(engine.step())
    for name in ("a", "b", "unknown"):
        engine.abort(Key(name, 0))
    run(engine, client)
    assert client.end("a").reason == client.end("b").reason == "abort"
    assert engine.is_idle
    engine.check()


def test_deadlines_count_from_receipt_and_timings_tell_the_phases_apart() -> None:
    clock = Clock()
    engine, _ = make(clock=clock, max_batch_size=1, overlap=False)
    client = Client()
    engine.submit(request("a", max_tokens=3, timeout_s=10))
    engine.submit(request("b", timeout_s=7))
    clock.now_s += 2
    client.take(engine.step())
    assert engine.seconds_to_deadline() == 5
    clock.now_s += 1
    client.take(engine.step())
    clock.now_s += 4
    client.take(engine.step())
    assert msgspec.structs.astuple(client.end("a").timings) == (2, 0, 0, 5)
    late = client.end("b")
    assert late.error is not None
    assert late.error.code == "deadline_exceeded"
    assert late.timings.queue_s == 7
    assert engine.seconds_to_deadline() is None


def test_a_deadline_wakes_an_engine_that_has_nothing_else_to_do() -> None:
    clock = Clock()
    link = FakeLink(FakeRunner(), FakeRunner())
    engine = Engine(link.target, importer=link.importer, clock=clock)
    engine.submit(request(phase="generation", timeout_s=5))
    run(engine)
    assert not engine.has_work
    clock.now_s += 5
    assert engine.has_work
    error = run(engine).end().error
    assert error is not None
    assert error.code == "deadline_exceeded"
    assert Key("r", 0) in link.refused


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
    runner.failures = [RuntimeError("sticky")] * MAX_FAILED_STEPS
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
    engine, runner = make(num_blocks=8, enable_block_reuse=False)
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


def test_a_context_request_without_a_peer_ends_after_its_first_token() -> None:
    engine, _ = make()
    engine.submit(msgspec.structs.replace(request(phase="context"), peer=None))
    client = run(engine)
    assert len(client.tokens()) == 1
    assert client.end().reason == "handoff"


def test_an_import_of_another_length_is_refused() -> None:
    link = FakeLink(FakeRunner(), FakeRunner())
    engine = Engine(link.target, importer=link.importer)
    engine.submit(request(phase="generation"))
    engine.post(ImportOffered(Key("r", 0), 4))
    error = run(engine).end().error
    assert error is not None
    assert error.code == "transfer_error.protocol"
    assert Key("r", 0) in link.refused


def test_an_offer_for_a_request_that_has_ended_is_refused_at_once() -> None:
    link = FakeLink(FakeRunner(), FakeRunner())
    engine = Engine(link.target, importer=link.importer)
    engine.submit(request(phase="generation", attempt=3))
    engine.abort(Key("r", 3))
    run(engine)
    link.refused.clear()
    engine.post(ImportOffered(Key("r", 2), 5))
    engine.post(ImportOffered(Key("r", 4), 5))
    run(engine)
    assert link.refused == {Key("r", 2)}


def test_stray_events_are_ignored() -> None:
    link = FakeLink(FakeRunner(), FakeRunner())
    engine = Engine(link.target, importer=link.importer)
    engine.submit(request())
    engine.post(ImportDone(Key("r", 0), 3))
    engine.post(ImportFailed(Key("unknown", 0), TransferError("late", "timeout")))
    assert run(engine).end().reason == "length"


def test_posting_an_event_wakes_the_host() -> None:
    woken: list[bool] = []
    wake: Callable[[], None] = lambda: woken.append(True)  # noqa: E731
    engine, _ = make(wake=wake)
    engine.post(ImportFailed(Key("unknown", 0), TransferError("late", "timeout")))
    assert woken == [True]
    assert engine.has_work

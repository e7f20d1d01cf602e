"""The engine with a fake model: every kind of end, every refusal, timings."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from pdserve.engine.schedule.engine import Engine
from pdserve.errors import TransferError
from pdserve.handoff import ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import GenerateRequest, Key
from tests.fakes.fake_link import FakeLink
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output, fake_logprob
from tests.unit.engine_bench import PROMPT, Client, Clock, error_of, make, overlap_of_steps, request, run

__all__ = ["overlap_of_steps"]


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
    assert msgspec.structs.astuple(client.end("a").timings) == (2, 0, 0, 5, 0, 0, 0)
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

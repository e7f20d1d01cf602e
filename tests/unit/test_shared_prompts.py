"""Prompts that begin alike and arrive together: what they share is computed once, also if steps fail."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pdserve.engine.schedule import prompts
from pdserve.engine.schedule.sequence import Sequence as Running
from pdserve.protocol import CacheGroupLimits, Key
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output
from tests.unit.engine_bench import Client, make, overlap_of_steps, request, run
from tests.unit.scheduler_bench import Bench
from tests.unit.test_engine_handoff import Pair, limits_of, make_request

__all__ = ["overlap_of_steps"]

SHARED = list(range(2, 24))
WINDOWS: list[tuple[int | None, ...]] = [(None,), (None, 6)]


@pytest.fixture(autouse=True)
def two_blocks_are_worth_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WORTH_A_STEP_TOKENS", 8)


def make_windowed(windows: Sequence[int | None], **settings: Any) -> Any:
    return make(**settings, cache_groups=limits_of(settings.get("num_blocks", 64), windows).cache_groups)


def check_tokens(client: Client, names: str, prompt: list[int], max_tokens: int = 6) -> None:
    for seed, name in enumerate(names):
        sampling = request(max_tokens=max_tokens, seed=seed).sampling
        assert client.tokens(name) == expected_output(prompt, sampling, SMALL_LIMITS)[0]


@pytest.mark.parametrize("windows", WINDOWS)
def test_the_choices_of_one_prompt_compute_its_whole_blocks_once(windows: Sequence[int | None]) -> None:
    engine, runner = make_windowed(windows)
    for seed, name in enumerate("abcd"):
        engine.submit(request(name, SHARED, seed=seed))
    client = run(engine)
    check_tokens(client, "abcd", SHARED)
    assert runner.history[0] == [(0, 22)]
    assert [share for share in runner.history[1] if share[1] > 1] == [(20, 2)] * 3, "with the next step, not later"
    assert [client.end(name).usage.cached_tokens for name in "abcd"] == [0, 20, 20, 20]
    assert not runner.mistakes
    engine.check()


def test_a_little_in_common_is_worth_no_wait() -> None:
    engine, runner = make()
    for name, tail in (("a", 30), ("b", 31)):
        engine.submit(request(name, [*SHARED[:7], *[tail] * 6]))
    run(engine)
    assert runner.history[0] == [(0, 13), (0, 13)]


def test_who_shares_nothing_does_not_wait_behind_those_who_do() -> None:
    engine, runner = make()
    other = [40, *SHARED[:7]]
    for name, prompt in (("a", SHARED), ("b", SHARED), ("c", other), ("d", SHARED)):
        engine.submit(request(name, prompt))
    client = run(engine)
    assert runner.history[0] == [(0, 22), (0, 8)]
    assert [share for share in runner.history[1] if share[1] > 1] == [(20, 2), (20, 2)]
    assert len(client.finished) == 4


def test_a_prompt_follows_one_that_is_computed_in_chunks_right_behind_the_last_block_they_share() -> None:
    engine, runner = make(max_num_tokens=8)
    for name, tail in (("a", 30), ("b", 31)):
        engine.submit(request(name, [*SHARED, *[tail] * 10], max_tokens=2))
    run(engine)
    prompts_only = [[share for share in step if share[1] > 1] for step in runner.history]
    assert prompts_only[:3] == [[(0, 8)], [(8, 8)], [(16, 8)]]
    assert prompts_only[3:5] == [[(24, 8)], [(22, 7)]], "when there is room for both, and with a copy of two tokens"


@pytest.mark.parametrize("options", [{"enable_block_reuse": False}, {"capacity_policy": "STATIC_BATCH"}])
def test_where_nothing_would_be_gained_nobody_waits(options: dict[str, Any]) -> None:
    engine, runner = make(max_num_tokens=64, **options)
    for name in "ab":
        engine.submit(request(name, SHARED))
    run(engine)
    assert runner.history[0] == [(0, 22), (0, 22)]


def test_a_prompt_whose_own_logprobs_are_wanted_does_not_wait() -> None:
    engine, runner = make(max_num_tokens=64)
    engine.submit(request("a", SHARED))
    engine.submit(request("b", SHARED, prompt_logprobs=0))
    run(engine)
    assert runner.history[0] == [(0, 22), (0, 22)]


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", ["a", "b", "c", "ac", "bd"])
def test_who_relied_on_a_failed_step_is_set_back_and_nobody_else_ends(
    bad: str, late: bool, windows: Sequence[int | None]
) -> None:
    engine, runner = make_windowed(windows, num_blocks=40)
    runner.is_bad, runner.fails_late = (lambda item: "abcd"[item.sampling.seed] in bad), late
    for seed, name in enumerate("abcd"):
        engine.submit(request(name, SHARED, seed=seed))
    client = run(engine)
    for seed, name in enumerate("abcd"):
        expected, _ = expected_output(SHARED, request(seed=seed).sampling, SMALL_LIMITS)
        assert client.tokens(name) == ([] if name in bad else expected)
        assert client.end(name).reason == ("error" if name in bad else "length")
    assert engine.failure is None
    assert not runner.mistakes
    engine.check()
    assert engine.stats().blocks.available == 40 * len(windows)


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_step_that_fails_once_costs_nobody_a_token(step: int, late: bool, windows: Sequence[int | None]) -> None:
    """Nobody is to blame: all of them go on, in steps of their own at first."""
    engine, runner = make_windowed(windows)
    client = Client()
    for seed, name in enumerate("abcd"):
        engine.submit(request(name, SHARED, seed=seed, max_tokens=9))
    for _ in range(step):
        client.take(engine.step())
    rows: list[int] = []
    is_bad = lambda item: bool(item.num_sampled) and not rows  # noqa: E731
    runner.is_bad, runner.fails_late = is_bad, late
    probe = runner.probe
    runner.probe = lambda: (rows.append(1), probe())[1]  # type: ignore[method-assign]
    run(engine, client)
    ended_early = [name for name in "abcd" if client.end(name).reason == "error"]
    assert len(ended_early) <= 1, "a step of one row that fails ends it"
    for seed, name in enumerate("abcd"):
        if name not in ended_early:
            expected, _ = expected_output(SHARED, request(seed=seed, max_tokens=9).sampling, SMALL_LIMITS)
            assert client.tokens(name) == expected
    assert not runner.mistakes
    engine.check()


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("bad", ["", "a", "b"])
def test_exports_share_a_prompt_and_survive_each_others_failures(
    bad: str, overlap: bool, late: bool, windows: Sequence[int | None]
) -> None:
    pair = Pair(windows=windows, overlap=overlap)
    for seed, name in enumerate("abcd"):
        asked = make_request(name, SHARED, max_tokens=5)
        pair.submit(msgspec.structs.replace(asked, sampling=msgspec.structs.replace(asked.sampling, seed=seed)))
    runner = pair.link.source
    runner.is_bad, runner.fails_late = (lambda item: "abcd"[item.sampling.seed] in bad), late
    pair.drain(60)
    for name in bad:
        pair.generation.abort(Key(name, 0))
    pair.settle()
    for seed, name in enumerate("abcd"):
        sampling = msgspec.structs.replace(make_request(max_tokens=5).sampling, seed=seed)
        if name in bad:
            assert pair.reasons(Key(name, 0))[0] == "error"
        else:
            assert pair.tokens(Key(name, 0)) == expected_output(SHARED, sampling, SMALL_LIMITS)[0]
            assert pair.reasons(Key(name, 0)) == ("handoff", "length")
    assert pair.context.failure is None
    pair.check_at_rest()
    if not bad:
        assert pair.context_client.end("d").usage.cached_tokens == 20
        assert pair.generation_client.end("d").usage.cached_tokens in (0, 20)


def test_a_block_that_nobody_has_computed_is_computed_by_the_first_of_its_holders() -> None:
    bench = Bench(max_num_tokens=64)
    a = bench.add(22, first=500)
    plan = bench.scheduler.plan()
    assert plan is not None
    bench.scheduler.launched(plan)
    b, c = bench.add(22, first=500), bench.add(22, first=500)
    behind = bench.scheduler.plan(ahead=True)
    assert behind is not None
    bench.scheduler.launched(behind)
    assert (b.num_computed, b.num_proven, b.tables[0][:5]) == (20, 0, a.tables[0][:5])
    for failed in (plan, behind):
        bench.scheduler.sharing.failed(failed)
        for sequence, item in zip(failed.sequences, failed.items, strict=True):
            bench.scheduler.collected(sequence, item)
    assert set(behind.casualties()) == {a, b, c}
    assert all(bench.scheduler.sharing.set_back(each) for each in (a, b, c))
    bench.scheduler.remove(a)
    bench.scheduler.release(a)
    assert bench.run()[1] == [(b, 0, 22)]
    assert bench.run()[1] == [(b, 22, 1), (c, 20, 2)]


def test_a_copy_in_one_cache_group_counts_though_the_next_group_had_no_block() -> None:
    bench = Bench(cache_groups=(CacheGroupLimits(16), CacheGroupLimits(2)))
    a = bench.add(6, first=500)
    bench.run()
    asked = msgspec.structs.replace(a.request, key=Key("child", 0), token_ids=list(a.token_ids))
    child = Running(asked, bench.limits, 2, 0.0)
    assert bench.scheduler.fork(a, child)
    plan = bench.scheduler.plan()
    assert plan is not None
    assert (plan.sequences, [copy.group for copy in plan.copies]) == ([a], [0]), "the child was preempted meanwhile"
    assert bench.scheduler.sharing.set_back(a)
    assert a.num_computed == 4


def test_a_copy_that_may_not_have_been_made_sets_back_also_who_is_not_in_its_step() -> None:
    bench = Bench()
    a = bench.add(6, first=500)
    bench.run()
    asked = msgspec.structs.replace(a.request, key=Key("child", 0), token_ids=list(a.token_ids))
    child = Running(asked, bench.limits, 2, 0.0)
    assert bench.scheduler.fork(a, child)
    plan = bench.scheduler.plan(only=[child])
    assert plan is not None
    assert (plan.sequences, len(plan.copies)) == ([child], 1)
    assert plan.copies[0].target == a.tables[0][1]
    assert a in plan.casualties()
    assert bench.scheduler.sharing.set_back(a)
    assert (a.num_computed, child.num_computed) == (4, 6)


def test_who_caught_up_without_a_share_of_the_step_is_set_back_with_it() -> None:
    bench = Bench(max_num_tokens=24)
    a = bench.add(22, first=500)
    first = bench.scheduler.plan()
    assert first is not None
    bench.scheduler.launched(first)
    b = bench.add(22, first=500)
    behind = bench.scheduler.plan(ahead=True)
    assert behind is not None
    bench.scheduler.launched(behind)
    for failed in (first, behind):
        bench.scheduler.sharing.failed(failed)
        for sequence, item in zip(failed.sequences, failed.items, strict=True):
            bench.scheduler.collected(sequence, item)
    assert all(bench.scheduler.sharing.set_back(each) for each in (a, b))
    again = bench.scheduler.plan(only=[a])
    assert again is not None
    bench.scheduler.launched(again)
    waiting = bench.scheduler.plan(only=[b])
    assert waiting is not None
    assert b.num_computed == 20
    waiting.sequences.clear()
    assert b in waiting.casualties()


def fork(engine: Any, runner: FakeRunner, name: str, seed: int, parent: Running) -> None:
    """What beam search does: one more sequence goes on from the KV of `parent`."""
    asked = request(name, list(parent.token_ids), seed=seed, max_tokens=parent.sampling.max_tokens)
    asked = msgspec.structs.replace(asked, num_prompt_tokens=len(parent.prompt_ids))
    child = Running(asked, runner.limits, 1000 + seed, parent.milestones.received_s)
    engine._requests.add(child)
    assert engine._scheduler.fork(parent, child)
    engine._may_progress = True


@pytest.mark.parametrize("windows", [*WINDOWS, (6,)])
@pytest.mark.parametrize("fails", ["", "launch", "late"])
@pytest.mark.parametrize("num_output", range(1, 6))
def test_forked_sequences_go_on_from_the_same_blocks_with_tokens_of_their_own(
    num_output: int, fails: str, windows: Sequence[int | None]
) -> None:
    engine, runner = make_windowed(windows, num_blocks=20)
    client = Client()
    engine.submit(request("a", SHARED, seed=0, max_tokens=12))
    while len(client.tokens("a")) < num_output:
        client.take(engine.step())
    (parent,) = engine._scheduler.running
    known = list(parent.token_ids)
    used = engine.stats().blocks.used
    for seed, name in enumerate("bc", 1):
        fork(engine, runner, name, seed, parent)
    assert engine.stats().blocks.used == used
    if fails:
        (runner.failures if fails == "launch" else runner.late_failures).append(RuntimeError("once"))
    run(engine, client)
    if fails == "late" and client.end("a").reason == "error":
        assert engine._max_in_flight, "the step before was of nobody else"
    for seed, name in enumerate("abc"):
        if client.end(name).reason == "error":
            assert (name, fails) == ("a", "late")
            continue
        start = len(SHARED) if name == "a" else len(known)
        sampling = request(seed=seed, max_tokens=12).sampling
        prompt = SHARED if name == "a" else known
        wanted = msgspec.structs.replace(sampling, max_tokens=12 - (start - len(SHARED)))
        assert client.tokens(name) == expected_output(prompt, wanted, SMALL_LIMITS)[0]
    assert not runner.mistakes
    engine.check()
    assert engine.stats().blocks.available == 20 * len(windows)


def test_a_windowed_group_holds_little_more_than_its_window_however_long_a_sequence_gets() -> None:
    engine, runner = make_windowed((None, 6), num_blocks=16)
    engine.submit(request("a", SHARED, seed=0, max_tokens=40))
    client, most = Client(), 0
    while engine.has_work:
        client.take(engine.step())
        most = max(most, engine._blocks.groups[1].counts().used if client.tokens("a") else 0)
    check_tokens(client, "a", SHARED, max_tokens=40)
    assert most <= 4, "six tokens lie in three blocks at most, and the step ahead needs another"
    assert not runner.mistakes

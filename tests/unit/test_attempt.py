"""The life of an attempt, state by state, and of the attempts of one choice, in any order of events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy.attempt
from pdserve.errors import (
    TRANSFER_REASONS,
    Draining,
    EngineError,
    Overloaded,
    PdserveError,
    RequestError,
    TransferError,
    WorkerLost,
)
from pdserve.protocol import GenerateRequest, Key, Sampling
from proxy.attempt import OVER, PATIENCE_S, TRANSITIONS, Attempt
from proxy.fleet.fleet import Placement
from proxy.output import Output
from tests.unit.attempt_bench import DEADLINE_S, MAX_TOKENS, PROMPT, Bench, StillLoop, Worker, Workers, limits, token

WITHDRAWN = TransferError("the context worker withdrew the request", "aborted")


@pytest.fixture
def loop() -> Iterator[StillLoop]:
    made = StillLoop()
    yield made
    made.close()


@dataclass
class Case:
    """One attempt at a context and a generation worker; `overs` are the states in which its owner was told so."""

    loop: StillLoop
    context: Worker = field(default_factory=lambda: Worker("context-0"))
    generation: Worker = field(default_factory=lambda: Worker("generation-0"))
    overs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.output = Output()
        placement: Any = Placement(self.context, self.generation)  # type: ignore[arg-type]
        self.attempt = Attempt(Key("r", 0), placement, self.output, None, self._over)
        self.attempt.start(self._request)

    def _request(self, phase: Any, peer: object) -> GenerateRequest:
        sampling = Sampling(seed=1, max_tokens=MAX_TOKENS)
        return GenerateRequest(
            key=Key("r", 0), token_ids=PROMPT, num_prompt_tokens=3, sampling=sampling, timeout_s=1.0, phase=phase
        )

    def _over(self, attempt: Attempt) -> None:
        self.overs.append(attempt.state)


def both_tell(case: Case) -> None:
    case.context.say(0)
    case.generation.end("length")


def first_token_ends_it(case: Case) -> None:
    case.context.say(0)
    case.context.end("stop")


WAYS: dict[str, Callable[[Case], None]] = {
    "running": lambda case: None,
    "doubted": lambda case: case.generation.end(error=WITHDRAWN),
    "ended": lambda case: case.generation.end("length"),
    "whole": both_tell,
    "complete": first_token_ends_it,
    "failed": lambda case: case.generation.end(error=EngineError("x")),
    "withdrawn": lambda case: case.attempt.withdraw(),
}
"""How an attempt gets into each state. In "doubted", "ended" and "whole" only the context worker is open."""

NEWS: dict[str, Callable[[Case], None]] = {
    "token 0": lambda case: case.context.say(0),
    "token 1": lambda case: case.generation.say(1),
    "context: stop": lambda case: case.context.end("stop"),
    "context: handoff": lambda case: case.context.end("handoff"),
    "context: error": lambda case: case.context.end(error=EngineError("x")),
    "context: abort": lambda case: case.context.end("abort"),
    "context: lost": lambda case: case.context.die(),
    "generation: length": lambda case: case.generation.end("length"),
    "generation: hearsay": lambda case: case.generation.end(error=WITHDRAWN),
    "generation: error": lambda case: case.generation.end(error=EngineError("x")),
    "generation: abort": lambda case: case.generation.end("abort"),
    "generation: lost": lambda case: case.generation.die(),
    "withdrawal": lambda case: case.attempt.withdraw(),
}

TABLE = """
                      running    doubted    ended      whole
token 0               running    doubted    whole      whole
token 1               running    .          .          .
context: stop         ended      failed     failed     complete
context: handoff      running    failed     failed     complete
context: error        failed     failed     failed     complete
context: abort        failed     failed     failed     complete
context: lost         failed     failed     failed     complete
generation: length    ended      .          .          .
generation: hearsay   doubted    .          .          .
generation: error     failed     .          .          .
generation: abort     failed     .          .          .
generation: lost      failed     .          .          .
time passes           running    failed     ended      complete
withdrawal            withdrawn  withdrawn  withdrawn  withdrawn
"""
"""What follows in each state. A dot: a worker that has ended says no more."""


def cases() -> list[tuple[str, str, str]]:
    header, *rows = (line for line in TABLE.splitlines() if line)
    states = header.split()
    found = [
        (state, row[:22].strip(), then)
        for row in rows
        for state, then in zip(states, row[22:].split(), strict=True)
        if then != "."
    ]
    return (
        found
        + [(state, "time passes", state) for state in sorted(OVER)]
        + [(state, "withdrawal", state) for state in sorted(OVER)]
    )


def run_case(loop: StillLoop, state: str, news: str) -> Case:
    case = Case(loop)
    loop.do(lambda: WAYS[state](case))
    assert case.attempt.state == state
    if news == "time passes":
        loop.pass_time(60.0)
    else:
        loop.do(lambda: NEWS[news](case))
    return case


@pytest.mark.parametrize(("state", "news", "then"), cases())
def test_what_follows_in_each_state(loop: StillLoop, state: str, news: str, then: str) -> None:
    case = run_case(loop, state, news)
    assert case.attempt.state == then
    assert len(loop.timers()) == (then in PATIENCE_S), "a state's timer is there for as long as the state"
    assert bool(case.context.open or case.generation.open) == (then not in OVER)
    assert case.overs == [then] * (then in ("complete", "failed")), "its owner is told once"
    assert (case.attempt.failure is not None) == (then == "failed")
    case.attempt.withdraw()


def test_the_table_leaves_no_transition_out(loop: StillLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    happens = Attempt._happens

    def record(self: Attempt, event: Any, *cause: Any) -> None:
        seen.add((self.state, event))
        happens(self, event, *cause)

    monkeypatch.setattr(proxy.attempt.Attempt, "_happens", record)
    for state, news, _ in cases():
        run_case(loop, state, news).attempt.withdraw()
    assert set(TRANSITIONS) <= seen


def test_a_first_token_that_ends_the_output_is_no_failure_though_the_other_worker_says_so(loop: StillLoop) -> None:
    case = Case(loop)
    loop.do(lambda: case.generation.end(error=WITHDRAWN))
    case.context.say(0)
    case.context.end("stop")
    assert (case.attempt.state, case.attempt.reason, loop.timers()) == ("complete", "stop", [])


def test_a_handoff_that_is_over_needs_no_context_worker(loop: StillLoop) -> None:
    case = Case(loop)
    case.context.say(0)
    case.generation.say(1)
    case.context.die()
    assert case.attempt.state == "running"
    case.generation.end("length")
    assert (case.attempt.state, case.output.tokens) == ("complete", [token(0), token(1)])


def test_a_context_worker_that_is_lost_says_no_more(loop: StillLoop) -> None:
    case = Case(loop)
    case.context.say(0)
    case.generation.say(1)
    loop.do(lambda: case.generation.end("stop"))
    assert case.attempt.state == "whole"
    case.context.die()
    assert (case.attempt.state, case.attempt.reason, loop.timers()) == ("complete", "stop", [])


def test_what_comes_after_the_end_is_not_heard(loop: StillLoop) -> None:
    case = Case(loop)
    (request, listener) = case.generation.open[Key("r", 0)]
    case.attempt.withdraw()
    case.generation.open[request.key] = request, listener
    case.generation.say(0, 1)
    case.generation.end("length")
    assert (case.attempt.state, case.output.tokens, case.overs) == ("withdrawn", [], [])


@pytest.mark.parametrize(
    ("reporter", "error", "culprits"),
    [
        ("context", EngineError("x"), {"context-0"}),
        ("context", TransferError("x", "peer_lost"), {"generation-0"}),
        ("generation", TransferError("x", "peer_lost"), {"context-0"}),
        ("generation", TransferError("x", "timeout"), {"context-0", "generation-0"}),
        ("context", TransferError("x", "aborted"), {"context-0"}),
    ],
)
def test_who_is_at_fault(loop: StillLoop, reporter: str, error: PdserveError, culprits: set[str]) -> None:
    case = Case(loop)
    getattr(case, reporter).end(error=error)
    assert case.attempt.failure is not None
    assert case.attempt.failure.culprits == culprits


@pytest.mark.parametrize(
    ("tokens", "victim", "progressed", "culprit_progressed"),
    [
        ([], "context", False, False),
        ([], "generation", False, False),
        ([0], "generation", True, False),
        ([0, 1], "generation", True, True),
        ([0], "context", True, True),
    ],
)
def test_whom_the_first_token_speaks_for(
    loop: StillLoop, tokens: list[int], victim: str, progressed: bool, culprit_progressed: bool
) -> None:
    case = Case(loop)
    if tokens:
        case.context.say(*tokens)
    getattr(case, victim).die()
    failure = case.attempt.failure
    assert failure is not None
    assert (failure.progressed, failure.culprit_progressed) == (progressed, culprit_progressed)


def kill_until_it_ends(bench: Bench, victims: list[Worker], first_tokens: bool) -> int:
    """Kill whoever of `victims` has the request, over and over; how many died."""
    killed = 0
    while not bench.generation.done:
        assert killed < 100, "a request that kills its workers is tried without end"
        if first_tokens:
            context = next(worker for worker in bench.workers.contexts if worker.open)
            index = len(bench.generation.output.tokens)
            bench.do(lambda: context.say(index))  # noqa: B023
        victim = next((worker for worker in victims if worker.open), None)
        if victim is not None:
            killed += 1
            bench.do(victim.die)
        bench.loop.pass_time(3.0)
    return killed


@pytest.mark.parametrize("losses", [0, 3, 5])
def test_a_prompt_that_kills_context_workers_is_given_up(loop: StillLoop, losses: int) -> None:
    bench = Bench(loop, Workers(), limits(2, losses))
    assert kill_until_it_ends(bench, bench.workers.contexts, first_tokens=False) == losses + 1
    assert isinstance(bench.generation.error, WorkerLost)
    bench.assert_at_rest()


def test_an_output_that_kills_generation_workers_is_given_up_though_there_are_first_tokens(loop: StillLoop) -> None:
    bench = Bench(loop, Workers(), limits(2, 3))
    assert kill_until_it_ends(bench, bench.workers.generations, first_tokens=True) == 4
    assert isinstance(bench.generation.error, WorkerLost)
    bench.assert_at_rest()


def test_a_request_whose_workers_are_killed_is_not_one_that_fails(loop: StillLoop) -> None:
    """Three times in a row before a token, as when workers come and go; `max_retries` is for what failed otherwise."""
    bench = Bench(loop, Workers(), limits(0, 3))
    for victims in (bench.workers.contexts, bench.workers.generations, bench.workers.contexts):
        bench.do(next(worker for worker in victims if worker.open).die)
        loop.pass_time(3.0)
    finish(bench)
    assert bench.generation.reason == "length"
    bench.assert_at_rest()


def test_a_peer_that_reports_the_loss_first_changes_nothing(loop: StillLoop) -> None:
    bench = Bench(loop, Workers(), limits(0, 1))
    for _ in range(2):
        reporter = next(worker for worker in bench.workers.generations if worker.open)
        bench.do(lambda: reporter.end(error=TransferError("gone", "peer_lost")))  # noqa: B023
        loop.pass_time(3.0)
    assert bench.generation.done
    bench.assert_at_rest()


def test_workers_that_give_tokens_before_they_are_lost_count_from_one_again(loop: StillLoop) -> None:
    bench = Bench(loop, Workers(), limits(0, 1))
    for index in range(0, MAX_TOKENS - 2, 2):
        context, generation = bench.workers.busy
        bench.do(lambda: context.say(index))  # noqa: B023
        bench.do(lambda: generation.say(index + 1))  # noqa: B023
        bench.do(generation.die)
        loop.pass_time(3.0)
    finish(bench)
    assert bench.generation.reason == "length"
    bench.assert_at_rest()


def finish(bench: Bench) -> None:
    """Let the attempt that runs end well."""
    context, generation = bench.workers.busy
    first = len(bench.generation.output.tokens)
    bench.do(lambda: context.say(first))
    bench.do(lambda: generation.say(*range(first + 1, MAX_TOKENS)))
    bench.do(lambda: context.end("handoff"))
    bench.do(lambda: generation.end("length"))
    assert bench.generation.output.tokens == [token(index) for index in range(MAX_TOKENS)]


def test_a_worker_that_ends_without_its_tokens_has_failed(loop: StillLoop) -> None:
    bench = Bench(loop, Workers(contexts=0), limits(0, 5))
    bench.do(lambda: bench.workers.generations[0].end("stop"))
    assert isinstance(bench.generation.error, EngineError)
    bench.assert_at_rest()


ERRORS = [
    EngineError("x"),
    Overloaded("full"),
    Draining("leaving"),
    WorkerLost("gone"),
    RequestError("no"),
    *(TransferError("x", reason) for reason in sorted(TRANSFER_REASONS)),
]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["tokens"] * 6 + ["next"] * 4 + ["end", "end", "fail", "fail", "die", "time", "time", "away"]),
        st.integers(0, 99),
        st.integers(0, 99),
    ),
    max_size=40,
)


class Story:
    """A choice to which anything happens, in any order; checked after each step."""

    def __init__(self, loop: StillLoop, num_contexts: int) -> None:
        self.bench = Bench(loop, Workers(contexts=num_contexts), stop_ids=frozenset({token(6)}))
        self.generation = self.bench.generation
        self.heard: set[int] = set()
        self.attempt = 0

    def step(self, what: str, one: int, two: int) -> None:
        workers = self.bench.workers
        self._note_attempt()
        if what == "time":
            self.bench.loop.pass_time([0.05, 0.2, 1.5, 6.0][one % 4])
        elif what == "away":
            self._toggle()
        elif workers.busy:
            worker = workers.busy[one % len(workers.busy)]
            self.bench.do(lambda: self._let(worker, what, two))
        self.check()

    def _toggle(self) -> None:
        workers = self.bench.workers
        if workers.away:
            self.bench.do(workers.return_)
        else:
            workers.away = True

    def _let(self, worker: Worker, what: str, dice: int) -> None:
        if what in ("tokens", "next"):
            start = len(self.generation.output.tokens) if what == "next" else dice // 3 % MAX_TOKENS
            indices = range(start, min(start + 1 + dice % 3, MAX_TOKENS))
            if indices:
                self.heard |= set(indices)
                worker.say(*indices)
        elif what == "end":
            reasons = ["handoff", "stop", "length"] if worker.request.phase == "context" else ["stop", "length"]
            worker.end([*reasons, "abort"][dice % (len(reasons) + 1)])
        elif what == "fail":
            worker.end(error=ERRORS[dice % len(ERRORS)])
        else:
            worker.die()

    def _note_attempt(self) -> None:
        for worker in self.bench.workers.busy:
            if worker.request.key.attempt > self.attempt:
                self.attempt, self.heard = worker.request.key.attempt, set()

    def check(self) -> None:
        tokens, workers = self.generation.output.tokens, self.bench.workers
        assert tokens == [token(index) for index in range(len(tokens))], "lost, or told twice"
        open_keys = {key for worker in workers.all for key in worker.open}
        assert len(open_keys) <= 1, "an older attempt is still open"
        if open_keys == {Key("r", self.attempt)}:
            assert len(tokens) not in self.heard, "a token that has come is not among them"
        for worker in workers.all:
            for request in worker.received:
                known = request.token_ids[len(PROMPT) :]
                assert known == tokens[: len(known)]
        if self.generation.done:
            self.bench.assert_at_rest()
            assert self.generation.reason is None or tokens
        else:
            assert open_keys or workers.waiters or len(self.bench.loop.timers()) == 2, "nothing will happen any more"


@settings(max_examples=300, deadline=None)
@given(STEPS, st.integers(0, 2), st.sampled_from(["nothing", "abort", "fail"]))
def test_whatever_happens_there_is_one_end_and_nothing_is_left(
    steps: list[tuple[str, int, int]], num_contexts: int, last: str
) -> None:
    loop = StillLoop()
    try:
        story = Story(loop, num_contexts)
        for step in steps:
            story.step(*step)
        generation, bench = story.generation, story.bench
        if last == "abort":
            bench.do(generation.abort)
        elif last == "fail":
            bench.do(lambda: generation.fail(Draining("shutting down")))
        loop.pass_time(DEADLINE_S)
        ended = generation.reason, generation.error, list(generation.output.tokens)
        bench.do(generation.abort)
        assert ended == (generation.reason, generation.error, generation.output.tokens)
        story.check()
        bench.assert_at_rest()
    finally:
        loop.close()

"""Both engines and the mover under whatever hypothesis, or a storm of random events, thinks of.

However requests, retries, aborts, failures and lost time are mixed: each attempt ends exactly once in each engine that
got it, tokens are the model's, and every block comes back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.engine.schedule import prompts
from pdserve.engine.schedule.sequence import Sequence
from pdserve.protocol import GenerateRequest, Key, Sampling
from tests.fakes.fake_drafter import FakeDrafter
from tests.fakes.fake_link import PEER
from tests.fakes.fake_runner import expected_output
from tests.unit.test_engine_handoff import Pair
from tests.unit.test_engine_scratch import make_kv_request


@pytest.fixture(autouse=True, scope="module")
def short_prompts_wait_too() -> Iterator[None]:
    """Prompts that share a block with one in the step wait for the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "WORTH_A_STEP_TOKENS", 4)
        yield


PICK = st.integers(0, 1 << 16)
ENDS = ["advance", "advance", "fail", "abort c", "abort g", "abort cg"]
SIDES = ["c", "g", "cg"]
ORDERS = ["cg", "gc", "c", "g", "local"]
KEEP = ["c", "g", "cg", "cgm"]


@dataclass
class Asked:
    """A request as its client sees it: what all earlier attempts have delivered, and the attempt in flight."""

    prompt: list[int]
    sampling: Sampling
    key: Key
    delivered: list[int]
    local: bool


class Chaos(RuleBasedStateMachine):
    """Arrivals, retries, aborts, failures and lost time in any order, over small pools."""

    options: dict[str, Any] = {"overlap": False, "capacity_policy": "MAX_UTILIZATION"}
    windows: tuple[int | None, ...] = (None,)
    host_blocks = 4

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(12, 10, self.host_blocks, self.windows, **self.options)
        self.asked: list[Asked] = []
        self.submitted: dict[Key, str] = {}
        self.batches_at_failure = {"c": -1, "g": -1}

    @rule(
        shared=st.integers(0, 12),
        tail=st.lists(st.integers(2, 6), min_size=1, max_size=16),
        max_tokens=st.integers(1, 14),
        order=st.sampled_from(ORDERS),
        timeout_s=st.sampled_from([3.0, 1000.0]),
    )
    def arrive(self, shared: int, tail: list[int], max_tokens: int, order: str, timeout_s: float) -> None:
        sampling = Sampling(seed=len(self.asked), max_tokens=max_tokens)
        key = Key(f"r{len(self.asked)}", 0)
        asked = Asked([3] * shared + tail, sampling, key, [], order == "local")
        self.asked.append(asked)
        self._send(asked, order, timeout_s)

    @rule(
        num_tokens=st.integers(1, 24), order=st.sampled_from([*SIDES, "gc"]), timeout_s=st.sampled_from([3.0, 1000.0])
    )
    def measure(self, num_tokens: int, order: str, timeout_s: float) -> None:
        """Scratch blocks are moved between the engines, which nobody may notice."""
        key = Key(f"kv{len(self.submitted)}", 0)
        self.submitted[key] = order
        request = make_kv_request(key, num_tokens, timeout_s)
        self.pair.submit(msgspec.structs.replace(request, evict=num_tokens % 2 == 0), order)

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, order=st.sampled_from(["cg", "gc"]))
    def retry(self, pick: int, order: str) -> None:
        asked = self.asked[pick % len(self.asked)]
        asked.delivered += self.pair.tokens(asked.key)
        asked.key = Key(asked.key.request_id, asked.key.attempt + 1)
        self._send(asked, "local" if asked.local else order, 1000.0)

    def _request(self, asked: Asked, timeout_s: float) -> GenerateRequest:
        return GenerateRequest(
            key=asked.key,
            token_ids=asked.prompt + asked.delivered,
            num_prompt_tokens=len(asked.prompt),
            sampling=asked.sampling,
            timeout_s=timeout_s,
            phase="both",
            peer=PEER,
        )

    def _send(self, asked: Asked, order: str, timeout_s: float) -> None:
        request = self._request(asked, timeout_s)
        self.submitted[asked.key] = "g" if order == "local" else order
        if order == "local":
            self.pair.generation.submit(request)
        else:
            self.pair.submit(request, order)

    @rule(rounds=st.integers(1, 4), keep=st.sampled_from(KEEP))
    def run(self, rounds: int, keep: str) -> None:
        """Some of context engine, generation engine and mover go on, the others stand still."""
        for _ in range(rounds):
            if "c" in keep:
                self.pair.context_client.take(self.pair.context.step())
            if "g" in keep:
                self.pair.generation_client.take(self.pair.generation.step())
            for key in list(self.pair.link.transfers) if "m" in keep else ():
                self.pair.link.advance(key)

    @precondition(lambda self: self.pair.link.transfers)
    @rule(pick=PICK, end=st.sampled_from(ENDS))
    def move(self, pick: int, end: str) -> None:
        """Something happens to one handoff, and one or both engines hear of it."""
        key = sorted(self.pair.link.transfers)[pick % len(self.pair.link.transfers)]
        if end == "advance":
            self.pair.link.advance(key)
        elif end == "fail":
            self.pair.link.fail(key)
        else:
            self._abort(key, end.split()[1])

    @precondition(lambda self: self.submitted)
    @rule(pick=PICK, sides=st.sampled_from(SIDES))
    def abort(self, pick: int, sides: str) -> None:
        self._abort(sorted(self.submitted)[pick % len(self.submitted)], sides)

    def _abort(self, key: Key, sides: str) -> None:
        for side in sides:
            (self.pair.context if side == "c" else self.pair.generation).abort(key)

    @rule(side=st.sampled_from("cg"), late=st.booleans())
    def break_a_step(self, side: str, late: bool) -> None:
        runner = self.pair.link.source if side == "c" else self.pair.link.target
        if not (runner.failures or runner.late_failures) and runner.batches > self.batches_at_failure[side]:
            (runner.late_failures if late else runner.failures).append(RuntimeError("injected"))
            self.batches_at_failure[side] = runner.batches

    @precondition(lambda self: self.asked)
    @rule(pick=PICK, side=st.sampled_from("cg"), late=st.booleans())
    def spoil(self, pick: int, side: str, late: bool) -> None:
        """From now on each step fails that has this request in it."""
        runner = self.pair.link.source if side == "c" else self.pair.link.target
        seed = self.asked[pick % len(self.asked)].sampling.seed
        runner.is_bad, runner.fails_late = (lambda item: item.sampling.seed == seed), late

    @rule(pick=PICK, max_tokens=st.integers(1, 8))
    def fork(self, pick: int, max_tokens: int) -> None:
        """One more sequence goes on from the KV of one that decodes, as a beam does."""
        engine = self.pair.generation
        decoding = [each for each in engine._scheduler.running if each.num_computed == len(each.token_ids) - 1]
        if not decoding:
            return
        parent = decoding[pick % len(decoding)]
        sampling = Sampling(seed=len(self.asked), max_tokens=max_tokens)
        asked = Asked(list(parent.token_ids), sampling, Key(f"r{len(self.asked)}", 0), [], True)
        child = Sequence(self._request(asked, 1000.0), engine.limits, next(engine._arrivals), self.pair.clock.now_s)
        if len(asked.prompt) < child.max_total_tokens and engine._scheduler.fork(parent, child):
            engine._requests.add(child)
            engine._may_progress = True
            self.asked.append(asked)
            self.submitted[asked.key] = "g"

    @rule()
    def lose_time(self) -> None:
        self.pair.clock.now_s += 1

    @invariant()
    def the_books_agree(self) -> None:
        self.pair.context.check()
        self.pair.generation.check()

    def teardown(self) -> None:
        for runner in (self.pair.link.source, self.pair.link.target):
            runner.failures.clear()
            runner.late_failures.clear()
            runner.is_bad = lambda _: False
        self.pair.drain(200)
        # What is left waits for a side that never came or left early: the mover gives up, then deadlines pass.
        for key in list(self.pair.link.transfers):
            self.pair.link.fail(key)
        self.pair.clock.now_s += 2000
        self.pair.settle()
        self.pair.check_at_rest()
        assert self.pair.context.failure is self.pair.generation.failure is None
        for key, sides in self.submitted.items():
            assert (key in self.pair.context_client.finished) == ("c" in sides)
            assert (key in self.pair.generation_client.finished) == ("g" in sides)
        for asked in self.asked:
            self._check_tokens(asked)
        if self.options.get("capacity_policy") != "MAX_UTILIZATION":
            assert not any(engine.stats().preemptions for engine in (self.pair.context, self.pair.generation))

    def _check_tokens(self, asked: Asked) -> None:
        limits = self.pair.link.target.limits
        longest = min(limits.max_seq_len, limits.num_blocks * limits.tokens_per_block + 1)
        limits = msgspec.structs.replace(limits, max_seq_len=longest)
        expected, reason = expected_output(asked.prompt, asked.sampling, limits)
        got = asked.delivered + self.pair.tokens(asked.key)
        assert got == expected[: len(got)]
        ends = [
            client.finished[asked.key].reason
            for client in (self.pair.context_client, self.pair.generation_client)
            if asked.key in client.finished
        ]
        for end in ends:
            if end in ("stop", "length"):
                assert (got, end) == (expected, reason)


class OverlappedChaos(Chaos):
    """The same, with each step launched before the one before it is looked at."""

    options = {"overlap": True, "capacity_policy": "MAX_UTILIZATION", "stream_interval": 3}


class GuaranteedChaos(Chaos):
    """Nobody is preempted, prompts share what little a step leaves them, and partial matches are taken over."""

    options = {
        "overlap": True,
        "capacity_policy": "GUARANTEED_NO_EVICT",
        "chunking_policy": "EQUAL_PROGRESS",
        "max_mixed_prefill_tokens": 3,
        "copy_on_partial_reuse": False,
    }
    host_blocks = 2


class StaticChaos(Chaos):
    """One batch after the other, and prompts wait for each other."""

    options = {
        "overlap": True,
        "capacity_policy": "STATIC_BATCH",
        "batch_wait_s": 1.5,
        "enable_chunked_prefill": False,
    }
    host_blocks = 3


class WindowChaos(Chaos):
    """A second cache group, which has a window."""

    options = {"overlap": True, "capacity_policy": "MAX_UTILIZATION"}
    windows = (None, 6)
    host_blocks = 0


class WindowFirstChaos(Chaos):
    """Two windows, of which the first is none that a block's length divides, and no preemption."""

    options = {"overlap": True, "capacity_policy": "GUARANTEED_NO_EVICT", "chunking_policy": "EQUAL_PROGRESS"}
    windows = (9, None, 4)
    host_blocks = 0


class DraftingChaos(Chaos):
    """Steps yield several tokens, of whatever number of right drafts."""

    policy = "MAX_UTILIZATION"

    def __init__(self) -> None:
        chance = random.Random(0)
        self.drafter = FakeDrafter(lambda most: chance.randint(0, most))
        self.options = {"overlap": True, "capacity_policy": self.policy, "drafter": self.drafter, "max_drafts": 5}
        super().__init__()

    def _send(self, asked: Asked, order: str, timeout_s: float) -> None:
        self.drafter.known.append((asked.prompt, asked.sampling))
        super()._send(asked, order, timeout_s)


class GuaranteedDraftingChaos(DraftingChaos):
    """Nobody is preempted for the sake of a draft, and a second cache group has a window."""

    policy = "GUARANTEED_NO_EVICT"
    windows = (None, 6)
    host_blocks = 0


KINDS = [
    Chaos,
    OverlappedChaos,
    GuaranteedChaos,
    StaticChaos,
    WindowChaos,
    WindowFirstChaos,
    DraftingChaos,
    GuaranteedDraftingChaos,
]
TestChaos = Chaos.TestCase
TestOverlappedChaos = OverlappedChaos.TestCase
TestGuaranteedChaos = GuaranteedChaos.TestCase
TestStaticChaos = StaticChaos.TestCase
TestWindowChaos = WindowChaos.TestCase
TestWindowFirstChaos = WindowFirstChaos.TestCase
TestDraftingChaos = DraftingChaos.TestCase
TestGuaranteedDraftingChaos = GuaranteedDraftingChaos.TestCase
for kind in KINDS:
    num_examples = 20 if issubclass(kind, DraftingChaos) else 60
    kind.TestCase.settings = settings(
        max_examples=num_examples, stateful_step_count=50, deadline=None, derandomize=True
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(25))
def test_a_long_storm(seed: int, kind: type[Chaos]) -> None:
    """Hypothesis prefers short stories, which shrink well; pools fill up only in long ones."""
    chance, chaos = random.Random(seed), kind()
    for _ in range(150):
        kinds = ["arrive", "retry", "run", "move", "abort", "break", "spoil", "measure", "fork"]
        what = chance.choices(kinds, [5, 1, 8, 6, 1, 0.3, 0.3, 1, 1])[0]
        pick = chance.randrange(1 << 16)
        if what == "arrive":
            tail = [chance.randint(2, 6) for _ in range(chance.randint(1, 16))]
            timeout_s = chance.choice([3.0, 1000.0, 1000.0])
            chaos.arrive(chance.randint(0, 12), tail, chance.randint(1, 14), chance.choice(ORDERS), timeout_s)
        elif what == "retry" and chaos.asked:
            chaos.retry(pick, chance.choice(["cg", "gc"]))
        elif what == "measure":
            chaos.measure(chance.randint(1, 24), chance.choice(SIDES), chance.choice([3.0, 1000.0]))
        elif what == "run":
            chaos.run(chance.randint(1, 4), chance.choice(KEEP))
        elif what == "move" and chaos.pair.link.transfers:
            chaos.move(pick, chance.choice(ENDS))
        elif what == "abort" and chaos.submitted:
            chaos.abort(pick, chance.choice(SIDES))
        elif what == "fork":
            chaos.fork(pick, chance.randint(1, 8))
        elif what == "break":
            chaos.break_a_step(chance.choice("cg"), chance.random() < 0.5)
            chaos.lose_time()
        elif what == "spoil" and chaos.asked:
            chaos.spoil(pick, chance.choice("cg"), chance.random() < 0.5)
        chaos.the_books_agree()
    chaos.teardown()

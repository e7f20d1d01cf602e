"""Placement policies, the rule for local prefill, and the order of a choice's tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.config import ConditionalDisaggConfig, ProxyConfig
from pdserve.protocol import Key, TokenDelta
from proxy.output import Output
from proxy.routing import POLICIES, Policy, pick
from proxy.routing.least_loaded import LeastLoaded
from proxy.routing.local_prefill import LocalPrefill
from proxy.routing.round_robin import RoundRobin


@dataclass
class Worker:
    worker_id: str
    open_requests: int = 0
    pending_prefill_tokens: int = 0

    @property
    def load(self) -> Worker:
        """Its load is itself."""
        return self


def picks(policy: Policy, workers: list[Worker], count: int, avoid: tuple[str, ...] = ()) -> list[str]:
    chosen = (pick(policy, workers, avoid) for _ in range(count))
    return [worker.worker_id for worker in chosen if worker is not None]


def test_round_robin_takes_everybody_in_turn() -> None:
    workers = [Worker("a", 100), Worker("b"), Worker("c")]
    assert picks(RoundRobin("generation"), workers, 6) == ["a", "b", "c", "a", "b", "c"]


def test_round_robin_goes_on_when_workers_change() -> None:
    policy = RoundRobin("generation")
    assert picks(policy, [Worker("a"), Worker("b"), Worker("c")], 2) == ["a", "b"]
    assert picks(policy, [Worker("a"), Worker("c")], 2) == ["c", "a"]


def test_least_loaded_looks_at_tokens_for_context_and_requests_for_generation() -> None:
    workers = [Worker("a", open_requests=9, pending_prefill_tokens=10), Worker("b", 1, 5000)]
    assert picks(LeastLoaded("context"), workers, 2) == ["a", "a"]
    assert picks(LeastLoaded("generation"), workers, 2) == ["b", "b"]


def test_equals_share() -> None:
    counts = Counter(picks(LeastLoaded("context"), [Worker("a"), Worker("b"), Worker("c")], 30))
    assert set(counts.values()) == {10}


def test_avoided_workers_come_last_but_come() -> None:
    policy = LeastLoaded("generation")
    assert picks(policy, [Worker("a"), Worker("b", 50)], 2, avoid=("a",)) == ["b", "b"]
    assert picks(policy, [Worker("a")], 1, avoid=("a",)) == ["a"]
    assert pick(policy, []) is None


def test_the_configuration_allows_the_policies_that_there_are() -> None:
    assert set(get_args(ProxyConfig.model_fields["placement"].annotation)) == set(POLICIES)


def takers(
    context_tokens: int | None, generation_tokens: list[int], max_queue_tokens: int | None
) -> tuple[str | None, list[str]]:
    """Why, and which of generation workers `0`, `1`, ..., with these prompt tokens in line, may take a prompt."""
    context = None if context_tokens is None else Worker("c", pending_prefill_tokens=context_tokens)
    generations = [Worker(str(index), 0, tokens) for index, tokens in enumerate(generation_tokens)]
    rule = LocalPrefill(ConditionalDisaggConfig(max_context_queue_tokens=max_queue_tokens))
    reason, chosen = rule.takers(context, generations)
    return reason, [worker.worker_id for worker in chosen]


@pytest.mark.parametrize(
    ("context_tokens", "generation_tokens", "max_queue_tokens", "expected"),
    [
        (100, [0, 0], 100, (None, [])),
        (101, [0, 7, 0], 100, ("queue", ["0", "2"])),
        (301, [50, 60], 100, ("queue", ["0"])),
        (300, [50, 60], 100, (None, [])),
        (101, [1, 200], 100, (None, [])),
        (0, [0], 0, (None, [])),
        (1, [0], 0, ("queue", ["0"])),
        (10**9, [0], None, (None, [])),
        (None, [0, 5], 100, ("no_context", ["0", "1"])),
        (None, [0], None, (None, [])),
        (None, [], 100, (None, [])),
        (101, [], 100, (None, [])),
    ],
)
def test_a_generation_worker_takes_a_prompt_whole_when_its_line_is_so_much_shorter(
    context_tokens: int | None,
    generation_tokens: list[int],
    max_queue_tokens: int | None,
    expected: tuple[str | None, list[str]],
) -> None:
    assert takers(context_tokens, generation_tokens, max_queue_tokens) == expected


def test_short_prompts_are_those_up_to_the_limit_and_none_by_default() -> None:
    rule = LocalPrefill(ConditionalDisaggConfig(max_local_prefill_length=64))
    assert (rule.is_short(64), rule.is_short(65), rule.is_possible) == (True, False, True)
    default = LocalPrefill(ConditionalDisaggConfig())
    assert (default.is_short(1), default.is_possible) == (False, False)
    assert LocalPrefill(ConditionalDisaggConfig(max_context_queue_tokens=0)).is_possible


@given(st.lists(st.integers(1, 4), min_size=1, max_size=10), st.randoms(use_true_random=False))
def test_deltas_in_any_order_and_repeated_give_the_tokens_in_order(sizes: list[int], random: object) -> None:
    deltas, start = [], 0
    for size in sizes:
        deltas.append(TokenDelta(Key("r", 0), start, list(range(start, start + size))))
        start += size
    shuffled = [*deltas, *deltas]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    output = Output()
    for delta in shuffled:
        output.add(delta)
        assert output.tokens == list(range(len(output.tokens)))
    assert output.tokens == list(range(start))
    assert not output.has_gap


def test_overlapping_deltas_are_cut() -> None:
    output = Output()
    output.add(TokenDelta(Key("r", 0), 0, [0, 1, 2]))
    output.add(TokenDelta(Key("r", 1), 1, [1, 2, 3]))
    output.add(TokenDelta(Key("r", 1), 6, [6]))
    assert output.tokens == [0, 1, 2, 3]
    assert output.has_gap

"""Steps that yield several tokens, with a fake model: whatever a drafter proposes, only the number of steps changes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from pdserve.engine.schedule.batch import BatchItem, confirmed
from pdserve.engine.schedule.drafts.prompt_lookup import PromptLookup
from pdserve.engine.schedule.engine import Engine
from pdserve.protocol import GenerateRequest, Key, Sampling
from tests.fakes.fake_drafter import FakeDrafter
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output, fake_logprob
from tests.unit.engine_bench import PROMPT, Client, make, overlap_of_steps, request, run
from tests.unit.test_engine_handoff import Pair, make_request
from tests.unit.test_isolation import NAMES, PROMPTS, check_healthy, make_bad

__all__ = ["overlap_of_steps"]

ACCEPTED: dict[str, Callable[[int], int]] = {
    "none": lambda _: 0,
    "some": lambda asked: asked // 2,
    "all": lambda asked: asked,
    "any": lambda asked: random.Random(asked).randint(0, asked),
}
KINDS: list[dict[str, Any]] = [
    {},
    {"ignore_eos": False},
    {"stop_token_ids": (7, 11, 13, 17, 19), "min_tokens": 5},
    {"logprobs": 0},
    {"repetition_penalty": 1.5, "logprobs": 0},
    {"max_tokens": 1},
]


def drafting(num_right: Callable[[int], int], requests: list[GenerateRequest], **settings: Any) -> tuple[Any, ...]:
    """An engine with a drafter that knows these `requests`, which are submitted."""
    drafter = FakeDrafter(num_right)
    engine, runner = make(drafter=drafter, **settings)
    for each in requests:
        drafter.known.append((each.token_ids, each.sampling))
        engine.submit(each)
    return engine, runner, drafter


def check_outputs(engine: Engine, runner: FakeRunner, client: Client, requests: list[GenerateRequest]) -> None:
    for asked in requests:
        tokens, reason = expected_output(asked.token_ids, asked.sampling, SMALL_LIMITS)
        name = asked.key.request_id
        assert (client.tokens(name), client.end(name).reason) == (tokens, reason)
        assert client.end(name).usage.completion_tokens == len(tokens)
        scored = [entry for delta in client.deltas[asked.key] for entry in delta.logprobs or ()]
        assert scored == (list(map(fake_logprob, tokens)) if asked.sampling.logprobs == 0 else [])
    assert not runner.mistakes
    assert engine.stats().blocks.available == runner.limits.num_blocks
    engine.check()


@pytest.mark.parametrize("accepted", ACCEPTED)
@pytest.mark.parametrize("stream_interval", [1, 3])
def test_drafts_change_no_output(accepted: str, stream_interval: int) -> None:
    requests = [
        request(str(number), [number + 2, 3, 4, 5 + number], **{"seed": number, "max_tokens": 30, **KINDS[number % 6]})
        for number in range(12)
    ]
    engine, runner, drafter = drafting(ACCEPTED[accepted], requests, stream_interval=stream_interval)
    check_outputs(engine, runner, run(engine), requests)
    assert drafter.num_proposed > 0


def test_right_drafts_save_steps_and_come_in_one_delta() -> None:
    steps = {}
    for accepted in ("none", "some", "all"):
        asked = request(max_tokens=26)
        engine, runner, _ = drafting(ACCEPTED[accepted], [asked], max_drafts=4)
        client = run(engine)
        check_outputs(engine, runner, client, [asked])
        steps[accepted] = runner.batches
        if accepted == "all":
            assert [len(delta.token_ids) for delta in client.deltas[asked.key]] == [1, 5, 5, 5, 5, 5]
        assert engine.stats().decode_tokens == 25
    assert steps == {"none": 26, "some": 11, "all": 1 + 5}


def test_a_stop_token_among_confirmed_drafts_ends_the_output_there() -> None:
    tokens, _ = expected_output(PROMPT, request(max_tokens=20).sampling, SMALL_LIMITS)
    assert tokens.index(tokens[3]) == 3
    asked = request(max_tokens=20, stop_token_ids=(tokens[3],))
    engine, runner, _ = drafting(ACCEPTED["all"], [asked], max_drafts=7)
    client = run(engine)
    check_outputs(engine, runner, client, [asked])
    assert client.tokens() == tokens[:4]
    assert runner.batches == 2


def test_no_more_is_guessed_than_may_still_come() -> None:
    asked = request(max_tokens=4)
    engine, runner, _ = drafting(ACCEPTED["all"], [asked], max_drafts=20)
    check_outputs(engine, runner, run(engine), [asked])
    assert runner.history == [[(0, 5)], [(5, 3)]], "two drafts: one token is drawn after them"


def test_blocks_of_wrong_drafts_are_given_back() -> None:
    asked = request(max_tokens=40)
    engine, runner, _ = drafting(ACCEPTED["none"], [asked], max_drafts=9, enable_block_reuse=False)
    client, launch, at_launch = Client(), runner.launch, []
    runner.launch = lambda items, copies: (at_launch.append(engine.stats().blocks.used), launch(items, copies))[1]
    while len(client.tokens()) < 20:
        client.take(engine.step())
        sequence = next(iter(engine._requests))
        if client.tokens() and not sequence.num_in_flight:
            assert engine.stats().blocks.used == -(-sequence.num_computed // 4)
    assert at_launch[1:5] == [4, 4, 5, 5], "of 15, 16, 17 and 18 tokens"
    run(engine, client)
    assert engine.stats().blocks.used == 0
    engine.check()


def test_a_table_that_was_cut_is_another_list() -> None:
    """A runner that has sent a table to its device compares lists by identity, and sends only what they grow by."""
    asked = request(max_tokens=30)
    engine, runner, _ = drafting(ACCEPTED["none"], [asked], max_drafts=9, enable_block_reuse=False)
    seen: dict[int, tuple[list[int], list[int]]] = {}
    launch = runner.launch

    def watching(items: list[BatchItem], copies: Any) -> Any:
        for item in items:
            table: Any = item.tables[0]
            known, content = seen.setdefault(id(table), (table, []))
            assert known is table
            assert table[: len(content)] == content
            content[:] = table
        return launch(items, copies)

    runner.launch = watching
    check_outputs(engine, runner, run(engine), [asked])
    assert len(seen) > 3


def test_every_decode_gets_its_token_before_anybody_drafts() -> None:
    requests = [request(str(number), [number + 2] * 3, seed=number, max_tokens=20) for number in range(6)]
    engine, runner, _ = drafting(ACCEPTED["none"], requests, max_num_tokens=9, max_drafts=8)
    check_outputs(engine, runner, run(engine), requests)
    full = [step for step in runner.history if len(step) == 6 and all(start >= 3 for start, _ in step)]
    assert full
    assert {sum(tokens for _, tokens in step) for step in full} == {7}, "half of what is left is for prompts"


@pytest.mark.parametrize("policy", ["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"])
def test_drafts_take_nobodys_blocks(policy: str) -> None:
    requests = [request(str(number), [number + 2] * 6, seed=number, max_tokens=10) for number in range(3)]
    preemptions = []
    for accepted in ("none", "all"):
        engine, runner, _ = drafting(
            ACCEPTED[accepted], requests, num_blocks=12, capacity_policy=policy, enable_block_reuse=False
        )
        check_outputs(engine, runner, run(engine), requests)
        preemptions.append(engine.stats().preemptions)
    assert preemptions == [0, 0]


def test_drafts_keep_nobody_waiting_for_blocks() -> None:
    requests = [request("a", [2, 3, 4], max_tokens=20), request("b", [5] * 12, max_tokens=2)]
    started = []
    for drafts in (1, 9):
        engine, runner, _ = drafting(
            ACCEPTED["none"], requests[:1], num_blocks=6, max_drafts=drafts, enable_block_reuse=False
        )
        client = Client()
        while len(client.tokens("a")) < 5:
            client.take(engine.step())
        engine.submit(requests[1])
        check_outputs(engine, runner, run(engine, client), requests)
        started.append(next(at for at, step in enumerate(runner.history) if (0, 12) in step))
    assert started[0] == started[1]


def test_preempted_requests_with_drafts_get_their_exact_tokens() -> None:
    requests = [request(name, [index + 2] * 6, max_tokens=20) for index, name in enumerate("abcd")]
    engine, runner, _ = drafting(ACCEPTED["some"], requests, num_blocks=8, enable_block_reuse=False)
    check_outputs(engine, runner, run(engine), requests)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("from_position", [0, 4, 8])
def test_only_the_bad_rows_of_a_step_with_drafts_fail(from_position: int, late: bool) -> None:
    requests = [request(name, prompt, max_tokens=9) for name, prompt in PROMPTS.items()]
    engine, runner, _ = drafting(ACCEPTED["some"], [], max_drafts=3)
    make_bad(runner, "ae", late=late, from_position=from_position)
    drafter = engine._options.drafter
    drafter.known += [(each.token_ids, each.sampling) for each in requests]
    for each in requests:
        engine.submit(each)
    check_healthy(engine, run(engine), "ae")
    assert len(requests) == len(NAMES)
    assert not runner.mistakes


def test_a_handoff_goes_on_with_drafts() -> None:
    drafter = FakeDrafter(ACCEPTED["some"])
    pair = Pair(drafter=drafter)
    for number in range(4):
        asked = make_request(str(number), [number + 2, *range(3, 12)], max_tokens=20)
        drafter.known.append((asked.token_ids, asked.sampling))
        pair.submit(asked)
    pair.settle()
    for prompt, sampling in drafter.known:
        key = Key(str(prompt[0] - 2), 0)
        assert pair.tokens(key) == expected_output(prompt, sampling, SMALL_LIMITS)[0]
        assert pair.reasons(key) == ("handoff", "length")
    assert pair.link.target.batches < 19, "several tokens a step"
    pair.check_at_rest()


def test_a_retry_goes_on_where_drafts_have_brought_it() -> None:
    asked = request(max_tokens=30)
    engine, runner, _ = drafting(ACCEPTED["some"], [asked])
    client = Client()
    while len(client.tokens()) < 11:
        client.take(engine.step())
    said = client.tokens()
    again = request(token_ids=PROMPT + said, num_prompt_tokens=len(PROMPT), attempt=1, max_tokens=30)
    engine.submit(again)
    run(engine, client)
    assert said + client.tokens(attempt=1) == expected_output(PROMPT, asked.sampling, SMALL_LIMITS)[0]
    assert not runner.mistakes
    engine.check()


def test_draws_count_up_to_the_first_that_was_not_guessed() -> None:
    assert confirmed([5], []) == [5]
    assert confirmed([5, 6, 7], [5, 6]) == [5, 6, 7]
    assert confirmed([5, 6, 7], [5, 9]) == [5, 6]
    assert confirmed([5, 6, 7], [9, 6]) == [5]
    item = BatchItem([3, 8, 9], 4, [[0, 1]], 3, Sampling(seed=0, max_tokens=1))
    assert item.drafts == [8, 9]
    assert not BatchItem([3, 8, 9], 4, [[0, 1]], 1, item.sampling).drafts
    assert not BatchItem([3, 8, 9], 4, [[0, 1]], 0, item.sampling).drafts


def test_prompt_lookup_finds_what_followed_the_newest_tokens_last_time() -> None:
    lookup = PromptLookup(num_matched=2)
    assert lookup.propose([1, 2, 3, 4, 9, 1, 2, 5, 6, 1, 2], 3) == [5, 6, 1]
    assert lookup.propose([1, 2, 3, 4, 9, 1, 2, 5, 6, 1, 2], 9) == [5, 6, 1, 2]
    assert lookup.propose([4, 4, 4, 4], 3) == [4]
    assert lookup.propose([1, 2, 3], 3) == []
    assert lookup.propose([1], 3) == []
    # As bytes the newest tokens stand in the midst of the first ones, too.
    assert lookup.propose([256, 256, 7, 0, 1 << 24, 1 << 24, 0, 256, 256], 2) == [7, 0]
    assert lookup.propose([1 << 24, 1 << 24, 0, 5, 1, 1, 1 << 8, 1 << 16], 2) == []


def test_a_model_that_repeats_itself_is_looked_up() -> None:
    prompt = [5, 6, 7, 8, 9] * 6
    plain, drafted = (make(max_seq_len=64, **settings) for settings in ({}, {"drafter": PromptLookup()}))
    outputs = []
    for engine, runner in (plain, drafted):
        engine.submit(request(token_ids=prompt, max_tokens=20))
        client = run(engine)
        outputs.append((client.tokens(), client.end().reason))
        assert not runner.mistakes
    assert outputs[0] == outputs[1]

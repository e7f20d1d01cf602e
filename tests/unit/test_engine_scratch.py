"""Requests that only move KV, to measure it: they end where they should, and nobody else notices them."""

from __future__ import annotations

import msgspec
import pytest

from pdserve.handoff import HandoffCost
from pdserve.protocol import GenerateRequest, Key, Sampling
from tests.fakes.fake_link import PEER
from tests.fakes.fake_runner import SMALL_LIMITS, expected_output
from tests.unit.test_engine_handoff import PROMPT, Pair, make_request

WIDTH = SMALL_LIMITS.tokens_per_block


def make_kv_request(key: Key, num_tokens: int, timeout_s: float = 1000.0) -> GenerateRequest:
    return GenerateRequest(
        key=key,
        token_ids=[0] * num_tokens,
        num_prompt_tokens=num_tokens,
        sampling=Sampling(seed=0, max_tokens=1),
        timeout_s=timeout_s,
        phase="both",
        peer=PEER,
        kv_only=True,
    )


KV = make_kv_request(Key("kv", 0), 5 * WIDTH - 1)


@pytest.mark.parametrize("order", ["cg", "gc"])
def test_both_ends_finish_with_what_the_mover_measured(order: str) -> None:
    pair = Pair()
    pair.link.cost = HandoffCost("peer", 4096, seconds=2.5, busy_s=0.5, exposed_s=1.5, waited_s=1.0, moving_s=0.75)
    pair.submit(KV, order)
    pair.settle()
    for client in (pair.context_client, pair.generation_client):
        end = client.end("kv")
        assert (end.reason, end.kv_bytes) == ("handoff", 4096)
        timings = end.timings
        assert (timings.handoff_s, timings.moving_s, timings.transfer_s, timings.exposed_s) == (2.5, 0.75, 0.5, 1.5)
        assert not client.tokens("kv")
    assert pair.context.stats().steps == pair.generation.stats().steps == 0
    pair.check_at_rest()
    assert pair.context.stats().blocks.cached == pair.generation.stats().blocks.cached == 0


def test_what_was_moved_is_never_taken_for_a_prompts_kv() -> None:
    pair, tokens = Pair(), [7] * (4 * WIDTH)
    pair.submit(msgspec.structs.replace(KV, token_ids=tokens, num_prompt_tokens=len(tokens)))
    pair.settle()
    request = make_request(token_ids=tokens)
    pair.submit(request)
    pair.settle()
    assert pair.context_client.end().usage.cached_tokens == 0
    assert pair.generation_client.end().usage.cached_tokens == 0
    assert pair.tokens(request.key) == expected_output(tokens, request.sampling, SMALL_LIMITS)[0]


def test_half_of_what_is_free_is_the_limit_on_either_side() -> None:
    for sizes in ((9, 64), (64, 9)):
        pair = Pair(*sizes)
        pair.submit(KV)
        assert not pair.drain(10) or sizes[1] == 9, "an end that is still expected waits for its client"
        pair.generation.abort(KV.key)
        pair.settle()
        small = pair.context_client if sizes[0] == 9 else pair.generation_client
        error = small.end("kv").error
        assert error is not None
        assert error.code == "overloaded"
        assert "5 blocks are wanted" in error.message
        assert "9 of 9 are free" in error.message
        pair.check_at_rest()


def test_no_cached_prefix_has_to_go_for_it() -> None:
    pair = Pair(context_blocks=12)
    for name, first in (("a", 20), ("b", 40)):
        pair.submit(make_request(name, [first, *PROMPT]))
    pair.settle()
    cached = pair.context.stats().blocks.cached
    assert cached >= 8, "fewer are free than are wanted"
    pair.submit(KV)
    pair.drain(10)
    assert pair.context_client.end("kv").reason == "error"
    assert pair.context.stats().blocks.cached == cached
    pair.generation.abort(KV.key)
    asked = Key("asked", 0)
    pair.submit(msgspec.structs.replace(KV, key=asked, evict=True))
    pair.settle()
    assert pair.reasons(asked) == ("handoff", "handoff")
    assert pair.context.stats().blocks.cached < cached
    pair.check_at_rest()


def test_it_waits_in_no_queue_and_takes_no_place_in_the_batch() -> None:
    pair = Pair(max_queue_size=1)
    for number in range(5):
        pair.submit(msgspec.structs.replace(KV, key=Key(f"kv{number}", 0)), "g")
    request = make_request()
    pair.submit(request)
    for _ in range(40):
        pair.step()
        for key in list(pair.link.transfers):
            pair.link.advance(key)
    assert pair.reasons(request.key) == ("handoff", "length")
    assert pair.generation.stats().awaiting_kv == 5


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("side", ["context", "generation"])
def test_one_that_is_cut_short_gives_its_blocks_back_once_the_mover_lets_go(stage: int, side: str) -> None:
    pair = Pair()
    pair.submit(KV)
    for number in range(stage):
        pair.step()
        if number:
            pair.link.advance(KV.key)
    (pair.context if side == "context" else pair.generation).abort(KV.key)
    for _ in range(4):
        pair.step()
        for key in list(pair.link.transfers):
            pair.link.advance(key)
    pair.context.abort(KV.key)
    pair.generation.abort(KV.key)
    pair.settle()
    pair.check_at_rest()


def test_it_needs_a_peer() -> None:
    pair = Pair()
    pair.context.submit(msgspec.structs.replace(KV, phase="context", peer=None))
    pair.generation.submit(KV)
    pair.step()
    for client in (pair.context_client, pair.generation_client):
        error = client.end("kv").error
        assert error is not None
        assert (error.code, error.param) == ("invalid_request", "peer")

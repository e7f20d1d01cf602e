"""A context and a generation engine joined by a fake mover, one case at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from pdserve.engine.schedule import scheduler
from pdserve.engine.schedule.block_manager import BlockManager
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.prefix_cache import BlockHashes
from pdserve.protocol import CacheGroupLimits, EngineLimits, GenerateRequest, Key, Phase, Sampling
from tests.fakes.fake_link import PEER, FakeLink
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner, expected_output
from tests.unit.engine_bench import Client, Clock

PROMPT = list(range(2, 15))


class Pair:
    """Both engines, the link, and a client of each; `context_blocks` and `generation_blocks` size the pools.

    `windows` has an entry for each cache group.
    """

    def __init__(
        self,
        context_blocks: int = 64,
        generation_blocks: int = 64,
        host_blocks: int = 0,
        windows: Sequence[int | None] = (None,),
        **options: Any,
    ) -> None:
        self.clock = Clock()
        runners = [
            FakeRunner(limits_of(blocks, windows), num_host_blocks=host_blocks)
            for blocks in (context_blocks, generation_blocks)
        ]
        self.link = FakeLink(*runners)
        chosen = EngineOptions(**{"overlap": False, **options})
        self.context = Engine(runners[0], chosen, exporter=self.link.exporter, clock=self.clock)
        self.generation = Engine(runners[1], chosen, importer=self.link.importer, clock=self.clock)
        self.link.post_to_source = self.context.post
        self.link.post_to_target = self.generation.post
        self.context_client, self.generation_client = Client(), Client()

    def submit(self, request: GenerateRequest, phases: str = "cg") -> None:
        for letter in phases:
            engine = self.context if letter == "c" else self.generation
            phase: Phase = "context" if letter == "c" else "generation"
            engine.submit(msgspec.structs.replace(request, phase=phase))

    def step(self) -> None:
        self.context_client.take(self.context.step())
        self.generation_client.take(self.generation.step())

    def drain(self, rounds: int) -> bool:
        """Step and move, at most `rounds` times, until both engines are idle; whether they are."""
        for _ in range(rounds):
            self.step()
            for key in list(self.link.transfers):
                self.link.advance(key)
            if self.context.is_idle and self.generation.is_idle and not self.link.transfers:
                self.step()
                return True
        return False

    def settle(self) -> None:
        assert self.drain(400), f"not idle: {self.context.stats()} {self.generation.stats()}"

    def tokens(self, key: Key) -> list[int]:
        return self.context_client.tokens(*_parts(key)) + self.generation_client.tokens(*_parts(key))

    def reasons(self, key: Key) -> tuple[str, str]:
        return self.context_client.finished[key].reason, self.generation_client.finished[key].reason

    def check_at_rest(self) -> None:
        for engine in (self.context, self.generation):
            engine.check()
            stats = engine.stats()
            assert stats.blocks.available == stats.blocks.total
            assert (stats.running, stats.waiting, stats.awaiting_kv) == (0, 0, 0)
            scheduler, handoffs = engine._scheduler, engine._handoffs
            tables = (scheduler.running, scheduler.waiting, scheduler.offered, scheduler.receiving)
            assert not any((*tables, handoffs.held, handoffs.exporting, handoffs._early_offers))
        assert not self.link.source.mistakes + self.link.target.mistakes


def limits_of(num_blocks: int, windows: Sequence[int | None]) -> EngineLimits:
    groups = tuple(CacheGroupLimits(num_blocks, window) for window in windows)
    return msgspec.structs.replace(SMALL_LIMITS, num_blocks=num_blocks, cache_groups=groups)


def _parts(key: Key) -> tuple[str, int]:
    return key.request_id, key.attempt


def make_request(name: str = "r", token_ids: list[int] | None = None, max_tokens: int = 8) -> GenerateRequest:
    token_ids = PROMPT if token_ids is None else token_ids
    return GenerateRequest(
        key=Key(name, 0),
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling=Sampling(seed=3, max_tokens=max_tokens, ignore_eos=True),
        timeout_s=1000,
        phase="both",
        peer=PEER,
    )


@pytest.mark.parametrize("order", ["cg", "gc"])
def test_a_handoff_continues_the_stream_and_accounts_for_its_time(order: str) -> None:
    pair, request = Pair(), make_request()
    pair.submit(request, order)
    pair.clock.now_s += 1
    pair.step()
    assert len(pair.context_client.tokens()) == 1, "the first token goes out before anything was moved"
    assert not pair.context_client.finished
    pair.link.advance(request.key)
    pair.step()
    pair.clock.now_s += 4
    pair.link.advance(request.key)
    pair.settle()
    assert pair.tokens(request.key) == expected_output(PROMPT, request.sampling, SMALL_LIMITS)[0]
    assert pair.reasons(request.key) == ("handoff", "length")
    assert pair.generation_client.deltas[request.key][0].start == 1
    context, generation = pair.context_client.end(), pair.generation_client.end()
    assert (context.timings.queue_s, context.timings.handoff_s, context.timings.decode_s) == (1, 4, 0)
    assert (generation.timings.prefill_s, generation.timings.handoff_s) == (0, 4)
    assert (context.usage.completion_tokens, generation.usage.completion_tokens) == (1, 8)
    pair.check_at_rest()


def test_an_offer_may_come_before_its_request() -> None:
    pair, request = Pair(), make_request()
    pair.submit(request, "c")
    pair.step()
    pair.link.advance(request.key)
    pair.step()
    pair.submit(request, "g")
    pair.settle()
    assert pair.reasons(request.key) == ("handoff", "length")


def test_an_offer_withdrawn_before_its_request_came_is_forgotten() -> None:
    pair, request = Pair(), make_request()
    pair.submit(request, "c")
    pair.step()
    pair.link.advance(request.key)
    pair.step()
    pair.link.fail(request.key)
    pair.settle()
    pair.check_at_rest()


def test_a_chunked_prefill_is_announced_chunk_by_chunk() -> None:
    pair, request = Pair(), make_request(token_ids=[index % 40 + 2 for index in range(50)], max_tokens=4)
    pair.submit(request)
    pair.step()
    assert len(pair.link.transfers[request.key].computed) == SMALL_LIMITS.max_num_tokens
    pair.step()
    assert len(pair.link.transfers[request.key].computed) == 50
    pair.settle()
    assert pair.reasons(request.key) == ("handoff", "length")


def test_whole_blocks_that_both_sides_have_are_not_sent_again() -> None:
    pair = Pair()
    for name in "ab":
        pair.submit(make_request(name))
        pair.settle()
    assert pair.context_client.end("b").usage.cached_tokens == 12
    assert pair.generation_client.end("b").usage.cached_tokens == 12
    assert pair.tokens(Key("a", 0)) == pair.tokens(Key("b", 0))


def test_a_first_token_that_ends_the_request_stops_the_handoff() -> None:
    pair, request = Pair(), make_request(max_tokens=1)
    pair.submit(request)
    pair.step()
    assert pair.context_client.end().reason == "length"
    assert not pair.context.is_idle, "the blocks belong to the mover until it says so"
    assert pair.context.stats().blocks.used > 0
    pair.generation.abort(request.key)
    pair.settle()
    pair.check_at_rest()


STAGES = ["submitted", "prefilling", "exporting", "offered", "receiving", "decoding"]


def bring_to(pair: Pair, request: GenerateRequest, stage: str) -> None:
    """Move a request whose prefill takes two steps to one of `STAGES`."""
    pair.submit(request)
    if stage == "submitted":
        return
    pair.step()
    if stage == "prefilling":
        return
    pair.step()
    if stage == "exporting":
        return
    pair.link.advance(request.key)
    if stage == "offered":
        return
    pair.step()
    assert pair.generation.stats().blocks.reserved > 0
    if stage == "decoding":
        pair.link.advance(request.key)
        pair.step()
        assert pair.generation.stats().running == 1


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["context aborts", "generation aborts", "both abort", "the mover fails"])
def test_a_handoff_cut_short_at_any_point_leaves_nothing(stage: str, how: str) -> None:
    pair, request = Pair(), make_request(token_ids=[index % 40 + 2 for index in range(50)], max_tokens=12)
    bring_to(pair, request, stage)
    if how == "the mover fails" and request.key in pair.link.transfers:
        pair.link.fail(request.key)
    if how in ("context aborts", "both abort"):
        pair.context.abort(request.key)
    if how in ("generation aborts", "both abort"):
        pair.generation.abort(request.key)
    if how == "both abort" and stage == "receiving":
        pair.step()
        assert pair.generation.stats().blocks.reserved > 0, "the mover may still write"
    for _ in range(3):
        pair.step()
        for key in list(pair.link.transfers):
            pair.link.advance(key)
    # One side's bad end makes the proxy withdraw the other.
    pair.context.abort(request.key)
    pair.generation.abort(request.key)
    pair.settle()
    assert request.key in pair.context_client.finished
    assert request.key in pair.generation_client.finished
    pair.check_at_rest()


def test_a_context_pool_full_of_exports_holds_the_next_prompt_back_without_spinning() -> None:
    pair = Pair(context_blocks=6)
    other = [index + 20 for index in range(13)]
    for name, prompt in (("a", PROMPT), ("b", other)):
        pair.submit(make_request(name, prompt))
    for _ in range(3):
        pair.step()
    assert not pair.context_client.tokens("b")
    assert not pair.context.has_work
    pair.settle()
    assert len(pair.tokens(Key("b", 0))) == 8


def test_a_generation_worker_whose_queue_is_full_refuses_at_once() -> None:
    """Before anybody has a token of it; the context worker hears of it by the offer."""
    pair, queued, refused = Pair(max_queue_size=1), make_request("queued"), make_request("refused")
    pair.submit(queued, "g")
    pair.submit(refused, "g")
    pair.step()
    error = pair.generation_client.end("refused").error
    assert error is not None
    assert (error.code, error.status, error.param) == ("overloaded", 429, "max_queue_size")
    pair.submit(refused, "c")
    for _ in range(4):
        pair.step()
        for key in list(pair.link.transfers):
            pair.link.advance(key)
    error = pair.context_client.end("refused").error
    assert error is not None
    assert error.code == "transfer_error.refused"
    pair.generation.abort(queued.key)
    pair.settle()
    pair.check_at_rest()


def test_an_offer_waits_for_blocks() -> None:
    pair = Pair(generation_blocks=5)
    other = [index + 20 for index in range(13)]
    for name, prompt in (("a", PROMPT), ("b", other)):
        pair.submit(make_request(name, prompt, max_tokens=5))
    for _ in range(4):
        pair.step()
        for key in list(pair.link.transfers):
            if pair.link.transfers[key].target_tables is None:
                pair.link.advance(key)
    accepted = [each.target_tables is not None for each in pair.link.transfers.values()]
    assert accepted == [True, False]
    assert not pair.generation.has_work
    pair.settle()
    assert [len(pair.tokens(Key(name, 0))) for name in "ab"] == [5, 5]


def test_a_long_import_is_offered_for_reuse_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """To register all blocks of a long prompt at once would hold everybody's next token up."""
    at_once: list[int] = []
    register = BlockManager.register

    def noted(
        self: BlockManager, hashes: BlockHashes, block_ids: list[int], first: int, end: int, pending: bool
    ) -> None:
        at_once.append(end - first)
        register(self, hashes, block_ids, first, end, pending)

    monkeypatch.setattr(BlockManager, "register", noted)
    monkeypatch.setattr(scheduler, "REGISTERED_AT_ONCE", 1)
    pair = Pair()
    width = SMALL_LIMITS.tokens_per_block
    prompt = list(range(2, 2 + 6 * width))
    first = GenerateRequest(
        key=Key("long", 0),
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=Sampling(seed=1, max_tokens=2 * width, ignore_eos=True),
        timeout_s=60.0,
        phase="context",
        peer=PEER,
    )
    pair.submit(first)
    pair.settle()
    assert pair.tokens(first.key) == expected_output(prompt, first.sampling, SMALL_LIMITS)[0]
    pair.check_at_rest()
    assert at_once.count(1) >= 6
    again = msgspec.structs.replace(first, key=Key("again", 0))
    pair.submit(again)
    pair.settle()
    assert pair.generation_client.finished[again.key].usage.cached_tokens >= 5 * width
    pair.check_at_rest()

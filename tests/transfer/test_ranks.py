"""The contract of `pdserve.handoff` between workers of several ranks: one answer, once all are done."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
import torch

from kv_transfer.layout import KvLayout
from pdserve.errors import LayoutMismatch
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key, KvRank
from tests.transfer.harness import POISON, accept_into, only
from tests.transfer.ranked import PLAIN, SOURCE, TARGET, MakeWorker, assert_arrived, offer, pair, workers
from tests.transfer.shards import assert_holds, worker

__all__ = ["make"]

make = pytest.fixture(workers)

WIDER_BLOCKS = PLAIN | {"tokens_per_block": 8}
NARROW_VALUES = PLAIN | {"dtype": "float8_e4m3fn"}
CASES = {
    "tp 1 to 2": (worker(1, [5], **PLAIN), worker(2, [5], **PLAIN)),
    "tp 2 to 1": (worker(2, [5], **PLAIN), worker(1, [5], **PLAIN)),
    "tp 2 to 2": (worker(2, [5], **PLAIN), worker(2, [5], **PLAIN)),
    "tp 3 to 2": (worker(3, [5], **PLAIN), worker(2, [5], **PLAIN)),
    "replicas, tp 4 to 3": (worker(4, [5], **PLAIN), worker(3, [5], **PLAIN)),
    "pp 2 to 1": (worker(1, [2, 3], **PLAIN), worker(1, [5], **PLAIN)),
    "pp 3 to 2, uneven": (worker(1, [1, 3, 1], **PLAIN), worker(1, [4, 1], **PLAIN)),
    "tp 2 pp 2 to tp 3": (worker(2, [3, 2], **PLAIN), worker(3, [5], **PLAIN)),
    "wider blocks": (worker(2, [5], **PLAIN), worker(1, [5], **WIDER_BLOCKS)),
    "narrower blocks and values": (worker(1, [5], **WIDER_BLOCKS), worker(2, [2, 3], **NARROW_VALUES)),
}


@pytest.mark.parametrize(("senders", "receivers"), CASES.values(), ids=list(CASES))
def test_every_rank_gets_its_part(make: MakeWorker, senders: list[KvLayout], receivers: list[KvLayout]) -> None:
    cached = only(receivers[0]).tokens_per_block
    gen = make(receivers, "generation-0", "generation", on_offer=accept_into(lambda key: TARGET, lambda key: cached))
    ctx = make(senders, "context-0", "context", staging_tokens=16)
    for i, num_tokens in enumerate((9, 27, 32)):
        key = Key(f"r{i}", 0)
        cache = offer(ctx, gen, key, num_tokens, seed=i)
        for computed in (3, 8, 20):
            ctx.exporter.computed(key, min(computed, num_tokens))
        ctx.exporter.finish(key, 70 + i)
        assert gen.wait(ImportDone, key).first_token == 70 + i
        ctx.wait(ExportDone, key)
        for pool, each in zip(gen.pools, receivers, strict=True):
            assert_holds(pool, each, TARGET, cache, cached, exact_tail=False)
            pool.view(torch.uint8).fill_(POISON)
    assert len(ctx.leader.events) == 3
    assert len(gen.leader.events) == 6
    assert all(not node.events for node in (*ctx.nodes[1:], *gen.nodes[1:]))
    sent, received = (sum(c.bytes for c in w.leader.transceiver.counts()) for w in (ctx, gen))
    assert sent == received > 0
    ctx.assert_staging_free()
    gen.assert_staging_free()


@pytest.mark.parametrize("side", ["context", "generation"])
def test_nothing_has_ended_before_every_rank_has(make: MakeWorker, side: str) -> None:
    ctx, gen = pair(make)
    key = Key("r", 0)
    held = (ctx if side == "context" else gen).relays[1]
    held.hold = True
    offer(ctx, gen, key, 20)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, TARGET, 0)
    ctx.exporter.finish(key, 1)
    other = gen if side == "context" else ctx
    other.wait(ImportDone if side == "context" else ExportDone, key)
    time.sleep(0.05)
    assert (ctx if side == "context" else gen).endings(key) == []
    held.release()
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)


def test_a_follower_writes_only_after_the_step_that_may_read_its_blocks(make: MakeWorker) -> None:
    ctx, gen = pair(make)
    key = Key("r", 0)
    cache = offer(ctx, gen, key, 20)
    ctx.exporter.finish(key, 1)
    gen.wait(ImportOffered, key)
    gen.launch(0)  # rank 0 is a step ahead
    gen.importer.accept(key, TARGET, 0)
    time.sleep(0.1)
    assert bool((gen.pools[1].view(torch.uint8) == POISON).all())
    assert gen.endings(key) == []
    gen.launch(1)
    gen.wait(ImportDone, key)
    assert_arrived(gen, cache)


def test_a_follower_sends_only_after_the_step_that_computes(make: MakeWorker) -> None:
    ctx, gen = pair(make)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 20, SOURCE)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, TARGET, 0)
    ctx.launch(0)
    ctx.exporter.finish(key, 1)
    time.sleep(0.05)
    cache = ctx.compute(SOURCE, 20)
    ctx.launch(1)
    gen.wait(ImportDone, key)
    assert_holds(gen.pools[1], gen.layouts[1], TARGET, cache, 0, exact_tail=False)


def test_a_rank_may_have_sent_everything_before_it_hears_of_the_first_token(make: MakeWorker) -> None:
    ctx, gen = pair(make, (1, [2, 3]), (1, [5]))
    key = Key("r", 0)
    cache = offer(ctx, gen, key, 20)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, TARGET, 0)
    ctx.launch(0)
    for node, num_layers in zip(ctx.nodes, (2, 3), strict=True):
        node.exporter.computed(key, 20, num_layers)
    ctx.exporter.finish(key, 1)
    time.sleep(0.1)  # rank 0 is done; rank 1 waits for its own engine's step
    ctx.launch(1)
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)
    assert_holds(gen.pools[0], gen.layouts[0], TARGET, cache, 0, exact_tail=False)


def test_layers_are_sent_as_each_rank_says_that_they_are_computed(make: MakeWorker) -> None:
    ctx, gen = pair(make, (1, [2, 3]), (2, [5]))
    key = Key("r", 0)
    cache = offer(ctx, gen, key, 20)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, TARGET, 0)
    for node, num_layers in zip(ctx.nodes, (1, 2), strict=True):
        node.exporter.computed(key, 16, num_layers)
    token_bytes = 2 * 3 * 4 * 2
    total = 16 * (1 + 2) * token_bytes
    ranks = range(len(ctx.nodes))

    def sent(rank: int) -> int:
        return sum(counts.bytes for counts in ctx.nodes[rank].transceiver._counters.snapshot())

    gen.leader.wait_until(lambda: sum(sent(rank) for rank in ranks) == total, "the first layers")
    time.sleep(0.05)
    assert [sent(rank) for rank in ranks] == [16 * token_bytes, 32 * token_bytes]
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    assert_arrived(gen, cache)


@pytest.mark.parametrize("side", ["context", "generation"])
@pytest.mark.parametrize("accepted", [False, True])
def test_an_abort_ends_it_on_all_ranks(make: MakeWorker, side: str, accepted: bool) -> None:
    ctx, gen = pair(make, (2, [5]), (1, [2, 3]))
    key = Key("r", 0)
    offer(ctx, gen, key, 20)
    ctx.exporter.computed(key, 12)
    gen.wait(ImportOffered, key)
    if accepted:
        gen.importer.accept(key, TARGET, 0)
        gen.leader.wait_until(lambda: bool(gen.leader.transceiver.counts()[0].bytes), "the first tokens")
    (ctx.exporter if side == "context" else gen.importer).abort(key)
    # A rank of the receiver whose offer was still under way refuses it.
    assert ctx.wait(ExportFailed, key).error.reason in {"aborted", "aborted" if accepted else "refused"}
    if accepted or side == "context":
        assert gen.wait(ImportFailed, key).error.reason == "aborted"
    ctx.exporter.finish(key, 1)
    ctx.exporter.abort(key)
    gen.importer.abort(key)
    again = Key("r", 1)
    cache = offer(ctx, gen, again, 18)
    ctx.exporter.finish(again, 2)
    gen.wait(ImportOffered, again)
    gen.importer.accept(again, TARGET, 0)
    gen.wait(ImportDone, again)
    ctx.wait(ExportDone, again)
    assert len(ctx.endings(key)) == 1
    assert len(gen.endings(key)) == int(accepted or side == "context")
    assert_arrived(gen, cache)


def test_an_acceptance_of_what_is_over_is_answered_once(make: MakeWorker) -> None:
    ctx, gen = pair(make)
    key = Key("r", 0)
    offer(ctx, gen, key, 20)
    gen.wait(ImportOffered, key)
    ctx.exporter.abort(key)
    gen.wait(ImportFailed, key)
    gen.importer.accept(key, TARGET, 0)
    gen.importer.accept(Key("never", 0), TARGET, 0)
    assert gen.wait(ImportFailed, Key("never", 0)).error.reason == "protocol"
    time.sleep(0.05)
    assert len(gen.endings(key)) == 1


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("field", "value"), [("model", "another"), ("num_layers", 6), ("num_kv_heads", 4), ("kv_factor", 1)]
)
def test_another_model_is_refused_by_the_field(make: MakeWorker, field: str, value: Any, told: bool) -> None:
    """From the address, where it tells of layouts; by the receiver, where it does not."""
    other = PLAIN | {field: value}
    gen = make(worker(1, [other["num_layers"]], **other), "g", "generation")
    ctx = make(worker(2, [5], **PLAIN), "c", "context")
    peer = gen.address if told else msgspec.structs.replace(gen.address, ranks=())
    ctx.exporter.offer(Key("r", 0), peer, 20, SOURCE)
    error = ctx.wait(ExportFailed, Key("r", 0)).error
    assert isinstance(error, LayoutMismatch)
    assert error.param == field
    assert gen.leader.events == []


def test_an_address_that_lacks_a_rank_or_is_malformed_is_refused(make: MakeWorker) -> None:
    ctx, gen = pair(make)
    one, other = gen.address.ranks
    wrong = KvRank(one.instance, one.host, one.port, '{"model": 3}')
    ctx.exporter.offer(Key("0", 0), msgspec.structs.replace(gen.address, ranks=(wrong, other)), 20, SOURCE)
    assert ctx.wait(ExportFailed, Key("0", 0)).error.reason == "protocol"
    swapped = KvRank(other.instance, "", one.port, other.layout)
    ctx.exporter.offer(Key("1", 0), msgspec.structs.replace(gen.address, ranks=(one, swapped)), 20, SOURCE)
    assert ctx.wait(ExportFailed, Key("1", 0)).error.reason == "refused"


def test_two_attempts_of_one_request_do_not_mix(make: MakeWorker) -> None:
    ctx, gen = pair(make, (2, [5]), (3, [5]))
    old, new = Key("r", 0), Key("r", 1)
    offer(ctx, gen, old, 20)
    gen.wait(ImportOffered, old)
    gen.importer.accept(old, TARGET, 0)
    ctx.exporter.computed(old, 11)
    cache = offer(ctx, gen, new, 20, seed=4)
    assert gen.wait(ImportFailed, old).error.reason == "aborted"
    # A rank of the receiver's that hears of the newer attempt first refuses the older one.
    assert ctx.wait(ExportFailed, old).error.reason in {"aborted", "refused"}
    gen.wait(ImportOffered, new)
    gen.importer.accept(new, TARGET, 0)
    ctx.exporter.finish(new, 4)
    gen.wait(ImportDone, new)
    assert_arrived(gen, cache)
    assert len(gen.endings(old)) == len(ctx.endings(old)) == 1

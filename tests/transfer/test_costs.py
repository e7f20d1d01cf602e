"""What a handoff is said to have taken: what hid behind nothing, what waited for blocks, and how often it counts."""

from __future__ import annotations

import time

import pytest

from pdserve.handoff import ExportDone, HandoffCost, ImportDone, ImportOffered
from pdserve.protocol import Key, TransferCounts
from tests.transfer.harness import MakeNode, accept_into, context, generation, nodes
from tests.transfer.ranked import PLAIN, TARGET, MakeWorker, offer, workers
from tests.transfer.shards import worker

__all__ = ["make", "make_node"]

make_node = pytest.fixture(nodes, params=["LOOPBACK", "UCX"])
make = pytest.fixture(workers)
KEY, PAUSE_S = Key("r", 0), 0.25


def assert_counted(counts: TransferCounts, cost: HandoffCost) -> None:
    """`cost` is the only one that was counted."""
    for distribution, value in ((counts.exposed_s, cost.exposed_s), (counts.block_wait_s, cost.waited_s)):
        assert sum(distribution.counts) == 1
        assert distribution.total == value
    assert sum(counts.bandwidth_gb_s.counts) == 1
    assert counts.bandwidth_gb_s.total == pytest.approx(cost.nbytes / cost.busy_s / 1e9)


def test_waiting_for_blocks_is_exposed_once_all_is_computed(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    ctx.exporter.offer(KEY, gen.address, 9, [0, 1, 2])
    gen.wait(ImportOffered, KEY)
    ctx.exporter.finish(KEY, 5)
    time.sleep(PAUSE_S)
    gen.importer.accept(KEY, [3, 4, 5], 0)
    received, sent = gen.wait(ImportDone, KEY).cost, ctx.wait(ExportDone, KEY).cost
    assert (received.peer, sent.peer) == ("context-0", "generation-0")
    for cost in (received, sent):
        assert cost.nbytes == 3 * 480
        assert PAUSE_S * 0.9 < cost.waited_s <= cost.exposed_s <= cost.seconds + 0.01
        assert 0 < cost.busy_s <= cost.moving_s < cost.seconds
    assert_counted(gen.transceiver.counts()[0], received)
    assert_counted(ctx.transceiver.counts()[0], sent)


def test_what_goes_while_the_rest_is_computed_is_not_exposed(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node, on_offer=accept_into(lambda key: [3, 4, 5]))
    ctx.exporter.offer(KEY, gen.address, 9, [0, 1, 2])
    ctx.exporter.computed(KEY, 8)
    gen.wait(ImportOffered, KEY)
    time.sleep(PAUSE_S)
    ctx.exporter.finish(KEY, 5)
    for cost in (gen.wait(ImportDone, KEY).cost, ctx.wait(ExportDone, KEY).cost):
        assert cost.seconds > PAUSE_S * 0.9
        assert cost.waited_s < PAUSE_S / 2
        assert 0 < cost.exposed_s < PAUSE_S / 2
        assert cost.busy_s < PAUSE_S / 2


def test_a_worker_of_several_ranks_counts_a_handoff_once_with_the_bytes_of_all(make: MakeWorker) -> None:
    gen = make(worker(2, [5], **PLAIN), "generation-0", "generation", on_offer=accept_into(lambda key: TARGET))
    ctx = make(worker(2, [2, 3], **PLAIN), "context-0", "context")
    offer(ctx, gen, KEY, 27)
    ctx.exporter.finish(KEY, 7)
    received, sent = gen.wait(ImportDone, KEY).cost, ctx.wait(ExportDone, KEY).cost
    (receiver,), (sender,) = gen.leader.transceiver.counts(), ctx.leader.transceiver.counts()
    assert received.nbytes == sent.nbytes == receiver.bytes == sender.bytes > 0
    assert received.exposed_s > 0
    assert_counted(receiver, received)
    assert_counted(sender, sent)


def test_staging_of_all_ranks_is_told(make: MakeWorker) -> None:
    gen = make(worker(2, [5], **PLAIN), "generation-0", "generation", on_offer=accept_into(lambda key: TARGET))
    ctx = make(worker(2, [5], **PLAIN), "context-0", "context")
    leader, follower = (node.transceiver for node in gen.nodes)
    gen.leader.wait_until(lambda: leader.staging_bytes == 2 * follower.staging_bytes, "the follower's report")
    offer(ctx, gen, KEY, 27)
    ctx.exporter.computed(KEY, 12)
    gen.leader.wait_until(lambda: follower.staging_in_use_bytes > 0, "a grant on the follower")
    held = follower.staging_in_use_bytes
    gen.leader.wait_until(lambda: leader.staging_in_use_bytes >= 2 * held, "the news of it")
    ctx.exporter.finish(KEY, 7)
    gen.wait(ImportDone, KEY)
    gen.leader.wait_until(lambda: leader.staging_in_use_bytes == 0, "the news that it is free")

"""The contract of `pdserve.handoff`, between two transceivers of this process, over every backend."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from generation_worker.handoffs import Imports
from kv_transfer.layout import KvPoolView
from kv_transfer.options import TransceiverOptions
from kv_transfer.transceiver import Transceiver
from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ImportDone, ImportOffered
from pdserve.protocol import Key
from tests.transfer.harness import (
    BLOCKS,
    DIRECT,
    TOKENS_PER_BLOCK,
    MakeNode,
    accept_into,
    assert_only_written,
    context,
    generation,
    layout,
    nodes,
    num_blocks,
    pool_tensor,
    rows,
)
from tests.transfer.networks import BACKENDS, NETWORK

__all__ = ["make_node"]

make_node = pytest.fixture(nodes, params=[*BACKENDS, BACKENDS[0] + DIRECT])


class Unreached:
    """A mark of what the device has yet to run."""

    def query(self) -> bool:
        return False


SLOTS_OF = {Key(f"r{i}", 0): range(i * 8, i * 8 + 8) for i in range(4)}


@pytest.mark.parametrize("num_tokens", [1, TOKENS_PER_BLOCK, TOKENS_PER_BLOCK + 1, 101])
def test_a_handoff_is_bit_exact_and_touches_nothing_else(make_node: MakeNode, num_tokens: int) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key, n = Key("r", 0), num_blocks(num_tokens)
    source, target = random.sample(range(BLOCKS), n), random.sample(range(BLOCKS), n)
    ctx.exporter.offer(key, gen.address, num_tokens, source)
    for computed in range(0, num_tokens, 7):
        ctx.exporter.computed(key, computed)
    assert gen.wait(ImportOffered, key).num_tokens == num_tokens
    gen.importer.accept(key, target, 0)
    ctx.exporter.finish(key, first_token=77)
    assert gen.wait(ImportDone, key).first_token == 77
    ctx.wait(ExportDone, key)
    assert torch.equal(rows(gen.tensor, target), rows(ctx.tensor, source))
    assert_only_written(gen.tensor, target)
    (sent,), (received,) = ctx.transceiver.counts(), gen.transceiver.counts()
    assert sent.bytes == received.bytes == n * 480
    assert (sent.peer, sent.direction, sent.transfers, sent.in_flight) == ("generation-0", "sent", 1, 0)
    assert (received.peer, received.direction, received.transfers) == ("context-0", "received", 1)
    assert sent.transport == received.transport != ""
    assert sent.seconds > 0


def test_cached_blocks_are_neither_sent_nor_written(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key, blocks = Key("r", 0), list(range(10, 15))
    ctx.exporter.offer(key, gen.address, 18, blocks)
    ctx.exporter.finish(key, 5)
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, blocks, 3 * TOKENS_PER_BLOCK)
    gen.wait(ImportDone, key)
    assert torch.equal(rows(gen.tensor, blocks[3:]), rows(ctx.tensor, blocks[3:]))
    assert_only_written(gen.tensor, blocks[3:])
    assert gen.transceiver.counts()[0].bytes == 2 * 480


def test_a_prompt_that_is_cached_whole_needs_only_its_token(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 8, [0, 1])
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, [3, 4], 8)
    ctx.exporter.finish(key, 9)
    assert gen.wait(ImportDone, key).first_token == 9
    ctx.wait(ExportDone, key)
    assert_only_written(gen.tensor, [])


def test_an_offer_waits_for_its_acceptance(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    ctx.exporter.finish(key, 1)
    gen.wait(ImportOffered, key)
    time.sleep(0.1)
    assert ctx.endings(key) == []
    gen.importer.accept(key, [5, 6], 0)
    ctx.wait(ExportDone, key)
    assert torch.equal(rows(gen.tensor, [5, 6]), rows(ctx.tensor, [0, 1]))


@pytest.mark.parametrize("staging_tokens", [1, 2 * TOKENS_PER_BLOCK, 1000])
def test_many_at_once_share_little_staging(make_node: MakeNode, staging_tokens: int) -> None:
    blocks_of = {Key(f"r{i}", 0): list(range(i * 5, i * 5 + 1 + i % 5)) for i in range(12)}
    gen = generation(make_node, on_offer=accept_into(lambda key: blocks_of[key][::-1]), staging_tokens=staging_tokens)
    ctx = context(make_node, staging_tokens=TOKENS_PER_BLOCK)
    for key, blocks in blocks_of.items():
        ctx.exporter.offer(key, gen.address, len(blocks) * TOKENS_PER_BLOCK - 1, blocks)
    for i, key in enumerate(reversed(blocks_of)):
        ctx.exporter.finish(key, i)
    for key, blocks in blocks_of.items():
        ctx.wait(ExportDone, key)
        gen.wait(ImportDone, key)
        assert torch.equal(rows(gen.tensor, blocks[::-1]), rows(ctx.tensor, blocks))
    ctx.assert_staging_free()
    gen.assert_staging_free()
    assert 0 < gen.transceiver.staging_bytes <= max(1, staging_tokens // TOKENS_PER_BLOCK) * 480


def test_a_slow_prefill_keeps_no_other_waiting(make_node: MakeNode) -> None:
    """Buffers are granted ahead of what is computed; never so many that what is computed finds none."""
    ctx = context(make_node)
    gen = generation(make_node, on_offer=accept_into(lambda key: SLOTS_OF[key]), staging_tokens=4 * TOKENS_PER_BLOCK)
    for key, blocks in SLOTS_OF.items():
        ctx.exporter.offer(key, gen.address, len(blocks) * TOKENS_PER_BLOCK, blocks)
        gen.wait(ImportOffered, key)
    for key in reversed(SLOTS_OF):
        ctx.exporter.finish(key, 1)
        gen.wait(ImportDone, key)
        ctx.wait(ExportDone, key)
    assert torch.equal(rows(gen.tensor, range(32)), rows(ctx.tensor, range(32)))
    gen.assert_staging_free()


def test_waiting_for_a_prefill_is_no_time_of_transfer(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node, on_offer=accept_into(lambda key: [5, 6]))
    ctx.exporter.offer(Key("r", 0), gen.address, 8, [0, 1])
    gen.wait(ImportOffered, Key("r", 0))
    if not gen.direct_reads:
        gen.wait_until(lambda: gen.transceiver.staging_in_use_bytes > 0, "a grant ahead of the prefill")
    time.sleep(0.15)
    ctx.exporter.finish(Key("r", 0), 1)
    gen.wait(ImportDone, Key("r", 0))
    ctx.wait(ExportDone, Key("r", 0))
    for node in (ctx, gen):
        assert 0 < node.transceiver.counts()[0].seconds < 0.1


def test_chunks_are_pushed_as_they_are_computed(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node, staging_tokens=TOKENS_PER_BLOCK)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 18, range(5))
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, range(20, 25), 0)
    for computed, whole_blocks in ((3, 0), (4, 1), (11, 2), (16, 4), (17, 4)):
        ctx.exporter.computed(key, computed)
        gen.wait_until(lambda: gen.transceiver.counts()[0].bytes == whole_blocks * 480, f"{whole_blocks} blocks")  # noqa: B023
        assert torch.equal(rows(gen.tensor, range(20, 20 + whole_blocks)), rows(ctx.tensor, range(whole_blocks)))
        assert_only_written(gen.tensor, list(range(20, 20 + whole_blocks)))
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    assert torch.equal(rows(gen.tensor, range(20, 25)), rows(ctx.tensor, range(5)))


def test_several_contexts_feed_one_generation(make_node: MakeNode) -> None:
    gen = generation(make_node, on_offer=accept_into(lambda key: list(range(key.attempt * 8, key.attempt * 8 + 8))))
    contexts = [make_node(pool_tensor(BLOCKS, seed=i), f"context-{i}", role="context") for i in range(3)]
    for i, ctx in enumerate(contexts):
        ctx.exporter.offer(Key(f"r{i}", i), gen.address, 32, range(8))
        ctx.exporter.finish(Key(f"r{i}", i), i)
    for i, ctx in enumerate(contexts):
        gen.wait(ImportDone, Key(f"r{i}", i))
        assert torch.equal(rows(gen.tensor, range(i * 8, i * 8 + 8)), rows(ctx.tensor, range(8)))
    assert {counts.peer for counts in gen.transceiver.counts()} == {f"context-{i}" for i in range(3)}


def test_an_import_waits_for_all_that_its_engine_had_enqueued(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks may be those of a step that failed while it was launched, and of which a part is still to run."""
    ctx, gen = context(make_node), generation(make_node)
    enqueued, waited_for = Unreached(), list[object]()
    copier = gen.transceiver._copier
    unpack, read = copier.unpack, copier.read

    def noted_unpack(*of: Any) -> None:
        waited_for.append(of[-1])
        unpack(*of[:-1], None)

    def noted_read(*of: Any) -> None:
        waited_for.append(of[-1].after)
        read(*of[:-1], of[-1]._replace(after=None))

    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    ctx.exporter.finish(key, 1)
    gen.wait(ImportOffered, key)
    monkeypatch.setattr(copier, "unpack", noted_unpack)
    monkeypatch.setattr(copier, "read", noted_read)
    monkeypatch.setattr(copier, "mark", lambda: enqueued)
    gen.importer.accept(key, [5, 6], 0)
    gen.wait(ImportDone, key)
    assert waited_for[-1] is enqueued
    assert all(each in (None, enqueued) for each in waited_for)


def test_an_address_says_where_others_reach_it_on_every_rank() -> None:
    pool = KvPoolView((pool_tensor(BLOCKS, seed=1),), layout())
    config = CacheTransceiverConfig(backend=NETWORK)
    options = TransceiverOptions("w", "0.0.0.0", "10.1.2.3")
    made = Transceiver(pool, config, options, lambda _: None, imports=Imports())
    address = made.start()
    made.close()
    assert (address.host, address.ranks[0].host) == ("10.1.2.3", "10.1.2.3")

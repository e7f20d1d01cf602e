"""The contract of `pdserve.handoff`, between two transceivers of this process, over every backend."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from kv_transfer.layout import KvLayout
from pdserve.errors import LayoutMismatch
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key
from tests.transfer.harness import POISON, TOKENS_PER_BLOCK, Node, accept_into, layout, num_blocks, pool_tensor, rows

BLOCKS = 64
MakeNode = Callable[..., Node]


@pytest.fixture(params=["LOOPBACK", "UCX"])
def make_node(request: pytest.FixtureRequest) -> Iterator[MakeNode]:
    nodes: list[Node] = []

    def make(tensor: torch.Tensor, worker_id: str, **options: object) -> Node:
        options.setdefault("backend", request.param)
        nodes.append(Node(tensor, worker_id, **options))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for node in nodes:
        node.close()


def context(make_node: MakeNode, **options: object) -> Node:
    return make_node(pool_tensor(BLOCKS, seed=1), "context-0", role="context", **options)


def generation(make_node: MakeNode, **options: object) -> Node:
    return make_node(pool_tensor(BLOCKS, seed=None), "generation-0", role="generation", **options)


def assert_only_written(tensor: torch.Tensor, written: list[int]) -> None:
    others = [block for block in range(tensor.shape[0]) if block not in written]
    assert bool((rows(tensor, others) == POISON).all())


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


def test_the_context_side_aborts_before_acceptance(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, key)
    ctx.exporter.abort(key)
    assert ctx.wait(ExportFailed, key).error.reason == "aborted"
    assert gen.wait(ImportFailed, key).error.reason == "aborted"
    gen.importer.accept(key, [5, 6], 0)
    time.sleep(0.05)
    assert len(gen.endings(key)) == 1


@pytest.mark.parametrize("side", ["context", "generation"])
def test_an_abort_under_way_frees_both_sides(make_node: MakeNode, side: str) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key, other = Key("r", 0), Key("other", 0)
    ctx.exporter.offer(key, gen.address, 40, range(10))
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, range(10), 0)
    ctx.exporter.computed(key, 20)
    gen.wait_until(lambda: bool(gen.transceiver.counts()[0].bytes), "the first blocks")
    (ctx.exporter if side == "context" else gen.importer).abort(key)
    assert ctx.wait(ExportFailed, key).error.reason == "aborted"
    assert gen.wait(ImportFailed, key).error.reason == "aborted"
    ctx.exporter.finish(key, 1)
    ctx.exporter.abort(key)
    gen.importer.abort(key)
    ctx.exporter.offer(other, gen.address, 6, [0, 1])
    ctx.exporter.finish(other, 2)
    gen.wait(ImportOffered, other)
    gen.importer.accept(other, [20, 21], 0)
    gen.wait(ImportDone, other)
    assert torch.equal(rows(gen.tensor, [20, 21]), rows(ctx.tensor, [0, 1]))
    assert len(ctx.endings(key)) == len(gen.endings(key)) == 1
    ctx.assert_staging_free()
    gen.assert_staging_free()
    assert ctx.failures() == gen.failures() == {"aborted": 1}


def test_a_refused_offer_makes_no_event_on_the_refusing_side(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, key)
    gen.importer.abort(key)
    assert ctx.wait(ExportFailed, key).error.reason == "aborted"
    assert gen.endings(key) == []


def test_an_offer_that_was_aborted_before_it_came_is_refused(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 1)
    gen.importer.abort(key)
    for attempt in (1, 0):
        ctx.exporter.offer(Key("r", attempt), gen.address, 6, [0, 1])
        assert ctx.wait(ExportFailed, Key("r", attempt)).error.reason == "refused"
    assert gen.events == []
    ctx.exporter.offer(Key("r", 2), gen.address, 6, [0, 1])
    gen.wait(ImportOffered, Key("r", 2))


def test_a_newer_attempt_takes_the_place_of_an_older_one(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    late, old, new = Key("r", 0), Key("r", 1), Key("r", 2)
    ctx.exporter.offer(old, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, old)
    ctx.exporter.offer(late, gen.address, 6, [0, 1])
    assert ctx.wait(ExportFailed, late).error.reason == "refused"
    ctx.exporter.offer(new, gen.address, 6, [2, 3])
    gen.wait(ImportOffered, new)
    assert gen.wait(ImportFailed, old).error.reason == "aborted"
    assert ctx.wait(ExportFailed, old).error.reason == "aborted"
    gen.importer.accept(new, [2, 3], 0)
    ctx.exporter.finish(new, 4)
    gen.wait(ImportDone, new)
    ctx.exporter.offer(old, gen.address, 6, [0, 1])
    gen.wait_until(lambda: len(ctx.endings(old)) == 2, "the old attempt to be refused again")


@pytest.mark.parametrize("accepted", [False, True])
def test_a_handoff_that_takes_too_long_ends_on_both_sides(make_node: MakeNode, accepted: bool) -> None:
    ctx, gen = context(make_node, timeout_ms=300), generation(make_node, timeout_ms=250)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, key)
    if accepted:
        gen.importer.accept(key, [0, 1], 0)
    assert gen.wait(ImportFailed, key).error.reason == "timeout"
    assert ctx.wait(ExportFailed, key).error.reason == "timeout"
    ctx.assert_staging_free()
    gen.assert_staging_free()


def test_a_bad_acceptance_fails_by_itself(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    for i, (blocks, cached) in enumerate([([1], 0), ([1, 2], 3), ([1, 2], 12)]):
        key = Key(f"r{i}", 0)
        ctx.exporter.offer(key, gen.address, 6, [0, 1])
        gen.wait(ImportOffered, key)
        gen.importer.accept(key, blocks, cached)
        assert gen.wait(ImportFailed, key).error.reason == "protocol"
        assert ctx.wait(ExportFailed, key).error.reason == "protocol"
    gen.importer.accept(Key("unheard of", 0), [1], 0)
    assert gen.wait(ImportFailed, Key("unheard of", 0)).error.reason == "protocol"


@pytest.mark.parametrize(
    ("field", "of"),
    [("model", layout(model="another")), ("head_dim", layout(head_dim=6)), ("dtype", layout(dtype="bfloat16"))],
)
def test_pools_that_do_not_fit_are_refused_by_the_field(make_node: MakeNode, field: str, of: KvLayout) -> None:
    gen = generation(make_node)
    ctx = make_node(pool_tensor(4, 0, of), "context-0", of=of, role="context")
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    error = ctx.wait(ExportFailed, key).error
    assert isinstance(error, LayoutMismatch)
    assert error.param == field
    assert gen.events == []
    assert ctx.failures() == {"layout": 1}


def test_a_restarted_worker_on_the_same_port_is_noticed(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    old_address = gen.address
    gen.close()
    reborn = generation(make_node, port=old_address.port, on_offer=accept_into(lambda key: [0, 1]))
    assert reborn.address.port == old_address.port
    ctx.exporter.offer(Key("old", 0), old_address, 6, [0, 1])
    assert ctx.wait(ExportFailed, Key("old", 0)).error.reason == "refused"
    assert reborn.events == []
    ctx.exporter.offer(Key("new", 0), reborn.address, 6, [0, 1])
    ctx.exporter.finish(Key("new", 0), 1)
    ctx.wait(ExportDone, Key("new", 0))


def test_nobody_at_the_address_is_peer_lost(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    gen.close()
    ctx.exporter.offer(Key("r", 0), gen.address, 6, [0, 1])
    assert ctx.wait(ExportFailed, Key("r", 0)).error.reason == "peer_lost"


@pytest.mark.parametrize("side", ["context", "generation"])
def test_closing_ends_every_handoff_on_both_sides(make_node: MakeNode, side: str) -> None:
    ctx, gen = context(make_node), generation(make_node)
    keys = [Key(f"r{i}", 0) for i in range(3)]
    for key in keys:
        ctx.exporter.offer(key, gen.address, 40, range(10))
        ctx.exporter.computed(key, 39)
        gen.wait(ImportOffered, key)
        gen.importer.accept(key, range(10), 0)
    (ctx if side == "context" else gen).close()
    for key in keys:
        assert ctx.wait(ExportFailed, key).error.reason in {"aborted", "peer_lost"}
        assert gen.wait(ImportFailed, key).error.reason in {"aborted", "peer_lost"}
        assert len(ctx.endings(key)) == len(gen.endings(key)) == 1
    ctx.assert_staging_free()
    gen.assert_staging_free()
    after = Key("after", 0)
    if side == "context":
        ctx.exporter.offer(after, gen.address, 6, [0, 1])
        assert ctx.wait(ExportFailed, after).error.reason == "aborted"
    else:
        gen.importer.accept(after, [0, 1], 0)
        assert gen.wait(ImportFailed, after).error.reason == "aborted"

"""How a handoff ends early, on both sides alike: aborts, refusals, deadlines, restarts, the end of a transceiver."""

from __future__ import annotations

import time

import pytest
import torch

from kv_transfer.layout import KvLayout
from pdserve.errors import LayoutMismatch
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key
from tests.transfer.harness import (
    MakeNode,
    accept_into,
    context,
    generation,
    layout,
    nodes,
    pool_tensor,
    rows,
)
from tests.transfer.networks import BACKENDS

__all__ = ["make_node"]

make_node = pytest.fixture(nodes, params=BACKENDS)


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


LIMIT_MS = 400
PAST_THE_LIMIT_S = 1.5 * LIMIT_MS / 1000


def test_neither_a_queue_nor_a_prefill_is_time_of_transfer(make_node: MakeNode) -> None:
    """Before the offer is accepted, between two chunks of a prompt, and before its first token."""
    ctx, gen = context(make_node, timeout_ms=LIMIT_MS), generation(make_node, timeout_ms=LIMIT_MS)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 18, range(5))
    ctx.exporter.computed(key, 6)
    gen.wait(ImportOffered, key)
    time.sleep(PAST_THE_LIMIT_S)
    gen.importer.accept(key, range(10, 15), 0)
    for computed in (13, 18):
        ctx.exporter.computed(key, computed)
        time.sleep(PAST_THE_LIMIT_S)
    assert not ctx.endings(key)
    assert not gen.endings(key)
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)
    assert torch.equal(rows(gen.tensor, range(10, 15)), rows(ctx.tensor, range(5)))


@pytest.mark.parametrize("all_computed", [False, True])
@pytest.mark.parametrize("slow", ["context", "generation"])
def test_a_transfer_that_takes_too_long_ends_on_both_sides(make_node: MakeNode, slow: str, all_computed: bool) -> None:
    """`slow` has no staging for it; whoever notices first tells the other."""
    ctx, gen = context(make_node, timeout_ms=LIMIT_MS), generation(make_node, timeout_ms=LIMIT_MS)
    key = Key("r", 0)
    buffers = (ctx if slow == "context" else gen).transceiver._halves._staging[0]._free
    kept = buffers[:]
    buffers.clear()
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, key)
    gen.importer.accept(key, [0, 1], 0)
    if all_computed:
        ctx.exporter.finish(key, 1)
    else:
        ctx.exporter.computed(key, 5)
    assert gen.wait(ImportFailed, key).error.reason == "timeout"
    assert ctx.wait(ExportFailed, key).error.reason == "timeout"
    buffers.extend(kept)
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
    [("model", layout(model="another")), ("head_dim", layout(head_dim=6)), ("dtype", layout(dtype="int16"))],
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
    if side == "context":
        after = Key("after", 0)
        ctx.exporter.offer(after, gen.address, 6, [0, 1])
        assert ctx.wait(ExportFailed, after).error.reason == "aborted"


def test_an_acceptance_that_meets_a_closed_transceiver_is_answered_by_the_one_ending(make_node: MakeNode) -> None:
    ctx, gen = context(make_node), generation(make_node)
    key = Key("r", 0)
    ctx.exporter.offer(key, gen.address, 6, [0, 1])
    gen.wait(ImportOffered, key)
    gen.close()
    gen.importer.accept(key, [0, 1], 0)
    assert gen.wait(ImportFailed, key).error.reason == "aborted"
    assert len(gen.endings(key)) == 1

"""KV that is read where it is: only where pools are alike, never late, never from where it should not be."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kv_transfer import pieces
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key
from tests.transfer.harness import (
    DIRECT,
    MakeNode,
    Node,
    accept_into,
    context,
    generation,
    layout,
    nodes,
    pool_tensor,
    rows,
)
from tests.transfer.networks import SIMPLE
from tests.transfer.ranked import PLAIN, TARGET, MakeWorker, offer, workers
from tests.transfer.shards import worker

KEY = Key("r", 0)
STALL_S = 0.4

make_node = pytest.fixture(nodes, params=[SIMPLE + DIRECT])
make_worker = pytest.fixture(workers)


@pytest.mark.parametrize(
    ("sender", "receiver", "read"),
    [
        ({}, {}, True),
        ({"of": layout(tokens_per_block=8)}, {}, False),
        ({"direct_reads": False}, {}, False),
        ({}, {"direct_reads": False}, False),
    ],
)
def test_only_pools_that_are_alike_are_read(
    make_node: MakeNode, sender: dict[str, object], receiver: dict[str, object], read: bool
) -> None:
    of = sender.get("of", layout())
    ctx = make_node(pool_tensor(20, 1, of), "context-0", role="context", **sender)  # type: ignore[arg-type]
    gen = generation(make_node, on_offer=accept_into(lambda key: range(7)), **receiver)
    ctx.exporter.offer(KEY, gen.address, 27, range(3, 10))
    ctx.exporter.finish(KEY, 1)
    assert gen.wait(ImportDone, KEY)
    ctx.wait(ExportDone, KEY)
    for node in (ctx, gen):
        assert (node.transceiver.counts()[0].transport == "in_place") == read
    if of == layout():
        assert torch.equal(rows(gen.tensor, range(7)), rows(ctx.tensor, range(3, 10)))


def wait_for_a_block(node: Node) -> None:
    node.wait_until(lambda: any(counts.bytes for counts in node.transceiver.counts()), "the first block")


def half_read(make_node: MakeNode, **of_receiver: object) -> tuple[Node, Node]:
    """A context worker whose first 4 of 8 tokens are read, and the generation worker that has read them."""
    gen = generation(make_node, on_offer=accept_into(lambda key: [5, 6]), **of_receiver)
    ctx = context(make_node, stall_timeout_s=STALL_S)
    ctx.exporter.offer(KEY, gen.address, 8, [0, 1])
    ctx.exporter.computed(KEY, 4)
    wait_for_a_block(gen)
    return ctx, gen


def hold_up(node: Node, seconds: float) -> None:
    """Have the transceiver's thread stand still, from now on."""
    stands = threading.Barrier(2)

    def stand() -> None:
        stands.wait()
        time.sleep(seconds)

    node.transceiver._loop.call_soon_threadsafe(stand)
    stands.wait()


def test_what_is_read_too_late_is_not_used(make_node: MakeNode) -> None:
    ctx, gen = half_read(make_node, stall_timeout_s=10 * STALL_S)
    hold_up(gen, 1.5 * STALL_S)
    ctx.exporter.computed(KEY, 8)
    ended = gen.wait(ImportFailed, KEY)
    assert ended.error.reason == "timeout"
    assert ctx.wait(ExportFailed, KEY).error.reason == "timeout"


def test_blocks_that_may_be_read_stay_with_the_sender(make_node: MakeNode) -> None:
    """However it ends the handoff, until the promise is over."""
    ctx, gen = half_read(make_node, stall_timeout_s=10 * STALL_S)
    hold_up(gen, 0.5 * STALL_S)
    promised_s = time.monotonic()
    ctx.exporter.computed(KEY, 8)
    ctx.exporter.abort(KEY)
    ctx.wait(ExportFailed, KEY)
    assert time.monotonic() - promised_s >= STALL_S
    assert gen.wait(ImportFailed, KEY).error.reason == "aborted"


def test_closing_waits_for_promises(make_node: MakeNode) -> None:
    ctx, gen = half_read(make_node)
    promised_s = time.monotonic()
    ctx.close()
    assert [type(event) for event in ctx.endings(KEY)] == [ExportFailed]
    assert time.monotonic() - promised_s >= 0.5 * STALL_S
    gen.wait(ImportFailed, KEY)


@pytest.mark.parametrize("blocks", [[0, 64], [-1, 3], [2**40, 1]])
def test_blocks_that_the_sender_does_not_have_are_not_read(make_node: MakeNode, blocks: list[int]) -> None:
    gen = generation(make_node, on_offer=accept_into(lambda key: [5, 6]))
    ctx = context(make_node, checksum=False)
    ctx.exporter.offer(KEY, gen.address, 8, blocks)
    assert ctx.wait(ExportFailed, KEY).error.reason == "refused"
    assert not any(isinstance(event, ImportOffered) for event in gen.events)


def test_one_bit_is_noticed(make_node: MakeNode) -> None:
    gen = generation(make_node, on_offer=accept_into(lambda key: [5, 6]))
    ctx = context(make_node)
    copier = ctx.transceiver._copier
    right = copier.checksum_of
    copier.checksum_of = lambda *of: right(*of) ^ 1  # type: ignore[method-assign]
    ctx.exporter.offer(KEY, gen.address, 8, [0, 1])
    ctx.exporter.finish(KEY, 1)
    assert gen.wait(ImportFailed, KEY).error.reason == "checksum"
    assert ctx.wait(ExportFailed, KEY).error.reason == "checksum"


@dataclass
class Late:
    """Something that the device has finished `at_s`."""

    at_s: float

    def query(self) -> bool:
        return time.monotonic() >= self.at_s


def test_only_the_last_of_several_reads_is_awaited_without_a_pause(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though those before it are under way as well; all that counts for is when all is there."""
    gen = generation(make_node, on_offer=accept_into(lambda key: range(8)))
    ctx = context(make_node)
    monkeypatch.setattr(pieces, "READ_BYTES", 2 * gen.tensor[0].nbytes)
    reads: list[tuple[int, object, bool]] = []
    poller, read = gen.transceiver._poller, gen.transceiver._copier.read
    when = poller.when
    engine = Late(time.monotonic() + 60.0)

    def late_read(*of: Any) -> Late:
        target = of[-1]
        read(*of[:-1], target._replace(after=None))
        reads.append((target.piece.tokens.first, target.after, False))
        return Late(time.monotonic() + 0.02)

    def noted_when(mark: Any, then: Any, soon: bool = False) -> None:
        if reads:  # not of the margins, before
            reads[-1] = (*reads[-1][:2], soon)
        when(mark, then, soon)

    monkeypatch.setattr(gen.transceiver._copier, "mark", lambda: engine)
    monkeypatch.setattr(gen.transceiver._copier, "read", late_read)
    monkeypatch.setattr(poller, "when", noted_when)
    ctx.exporter.offer(KEY, gen.address, 32, range(8))
    ctx.exporter.finish(KEY, 1)
    gen.wait(ImportDone, KEY)
    ctx.wait(ExportDone, KEY)
    rehearsal, *rest = reads
    assert rehearsal == (0, None, False), "others' reads would wait behind it"
    assert rest == [(0, engine, False), (8, engine, False), (16, engine, False), (24, engine, True)]
    assert torch.equal(rows(gen.tensor, range(8)), rows(ctx.tensor, range(8)))


def test_reads_need_no_staging_which_a_silent_peer_may_hold(make_node: MakeNode) -> None:
    gen = generation(make_node, on_offer=accept_into(lambda key: range(8)))
    ctx = context(make_node)
    gen.transceiver._halves._staging[0]._free.clear()
    ctx.exporter.offer(KEY, gen.address, 32, range(8))
    ctx.exporter.finish(KEY, 1)
    gen.wait(ImportDone, KEY)
    ctx.wait(ExportDone, KEY)
    assert torch.equal(rows(gen.tensor, range(8)), rows(ctx.tensor, range(8)))


def slow_reads(node: Node, seconds: float) -> None:
    """Have each read take so long on the device; the transceiver's thread goes on."""
    read = node.transceiver._copier.read

    def read_slowly(*of: Any) -> Late:
        read(*of)
        return Late(time.monotonic() + seconds)

    node.transceiver._copier.read = read_slowly  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("all_computed", [False, True])
def test_a_slow_reader_keeps_the_blocks_for_as_long_as_it_reads(make_node: MakeNode, all_computed: bool) -> None:
    stall_s = 2 * STALL_S
    gen = generation(make_node, on_offer=accept_into(lambda key: [5, 6]), stall_timeout_s=stall_s)
    ctx = context(make_node, stall_timeout_s=stall_s)
    ctx.exporter.offer(KEY, gen.address, 8, [0, 1])
    if not all_computed:
        ctx.exporter.computed(KEY, 4)
        wait_for_a_block(gen)
    slow_reads(gen, 2 * stall_s)
    ctx.exporter.finish(KEY, 1)
    gen.wait(ImportDone, KEY)
    ctx.wait(ExportDone, KEY)
    assert torch.equal(rows(gen.tensor, [5, 6]), rows(ctx.tensor, [0, 1]))


def test_a_reader_that_is_lost_while_it_reads_keeps_nothing(make_node: MakeNode) -> None:
    gen = generation(make_node, on_offer=accept_into(lambda key: [5, 6]), stall_timeout_s=10 * STALL_S)
    ctx = context(make_node, stall_timeout_s=STALL_S)
    slow_reads(gen, 60.0)
    ctx.exporter.offer(KEY, gen.address, 8, [0, 1])
    ctx.exporter.finish(KEY, 1)
    gen.wait(ImportOffered, KEY)
    hold_up(gen, 3 * STALL_S)
    held_up_s = time.monotonic()
    assert ctx.wait(ExportFailed, KEY).error.reason == "timeout"
    assert time.monotonic() - held_up_s < 2.9 * STALL_S, "it is noticed while it stands still"
    gen.transceiver._copier.read = lambda *of: None  # type: ignore[method-assign, assignment]


def test_checksums_of_many_pieces_hold_up_neither_side(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checksum keeps its thread; a large prompt's together keep it for longer than a peer may be silent."""
    gen = generation(make_node, on_offer=accept_into(lambda key: range(32)), stall_timeout_s=STALL_S)
    ctx = context(make_node, stall_timeout_s=STALL_S)
    monkeypatch.setattr(pieces, "CHECKED_READ_BYTES", 2 * gen.tensor[0].nbytes)
    for node in (ctx, gen):
        right = node.transceiver._copier.checksum_of

        def slow(table: torch.Tensor, piece: pieces.Piece, right: Any = right) -> int:
            time.sleep(STALL_S / 6 * piece.tokens.size / 8)
            return int(right(table, piece))

        node.transceiver._copier.checksum_of = slow  # type: ignore[method-assign]
    ctx.exporter.offer(KEY, gen.address, 128, range(32))
    ctx.exporter.finish(KEY, 1)
    gen.wait(ImportDone, KEY)
    ctx.wait(ExportDone, KEY)
    assert torch.equal(rows(gen.tensor, range(32)), rows(ctx.tensor, range(32)))


def test_closing_waits_for_the_promises_of_ranks_that_are_not_heard(make_worker: MakeWorker) -> None:
    options = {"direct_reads": True, "stall_timeout_s": STALL_S}
    ranks = worker(1, [2, 3], **PLAIN)
    gen = make_worker(ranks, "generation-0", "generation", on_offer=accept_into(lambda key: TARGET), **options)
    ctx = make_worker(ranks, "context-0", "context", **options)
    offer(ctx, gen, KEY, 20)
    ctx.exporter.computed(KEY, 8)
    wait_for_a_block(gen.leader)
    ctx.relays[1].hold = True
    began_s = time.monotonic()
    ctx.leader.close()
    assert [type(event) for event in ctx.endings(KEY)] == [ExportFailed]
    assert time.monotonic() - began_s >= 1.5 * STALL_S, "for its own promises, and then as long for the others'"

"""What is kept for a peer goes when the peer goes: of many, the last ones leave no more behind than the first ones."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from context_worker import handoffs
from kv_transfer.counters import KEPT_PEERS
from kv_transfer.networks import ucx_progress
from pdserve.handoff import ExportDone, ImportDone
from pdserve.protocol import Key
from tests.transfer.harness import BLOCKS, MakeNode, Node, accept_into, nodes, pool_tensor
from tests.transfer.networks import BACKENDS

make_node = pytest.fixture(params=BACKENDS)(nodes)

VISITS = {"LOOPBACK": (20, 100)}
FEWER_VISITS = (10, 30)
"""After how many peers to look, and to look again."""

TARGET = range(5, 9)
OBJECTS_A_PEER = 10
"""Python's own number of objects varies; a link alone has more than 30."""


def hand_over(ctx: Node, gen: Node, name: str) -> None:
    key = Key(name, 0)
    ctx.exporter.offer(key, gen.address, 16, range(4))
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)
    ctx.events.clear()
    gen.events.clear()


def one_more(role: str, number: int, backend: str) -> Node:
    """A short-lived worker, with an id that nobody has had."""
    on_offer = accept_into(lambda key: TARGET) if role == "generation" else None
    tensor = pool_tensor(BLOCKS, seed=1)
    return Node(tensor, f"{role}-{number}", role=role, on_offer=on_offer, backend=backend)


def come_and_go(first: int, last: int, backend: str, resident: Node, resident_role: str) -> None:
    for number in range(first, last):
        if resident_role == "generation":
            visitor = one_more("context", number, backend)
            hand_over(visitor, resident, f"r{number}")
        else:
            visitor = one_more("generation", number, backend)
            hand_over(resident, visitor, f"r{number}")
        visitor.close()


def measure() -> dict[str, int]:
    """Descriptors go without the collector's help: it comes by seldom."""
    counts = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
    gc.collect()
    return counts | {"objects": len(gc.get_objects())}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("resident_role", ["context", "generation"])
def test_peers_that_come_and_go_leave_nothing(make_node: MakeNode, resident_role: str) -> None:
    on_offer = accept_into(lambda key: TARGET)
    resident = make_node(pool_tensor(BLOCKS, seed=2), f"{resident_role}-0", role=resident_role, on_offer=on_offer)
    backend = resident.transceiver._config.backend
    first, last = VISITS.get(backend, FEWER_VISITS)
    come_and_go(0, first, backend, resident, resident_role)
    settle(resident)
    early = measure()
    come_and_go(first, last, backend, resident, resident_role)
    settle(resident)
    late = measure()
    assert late["descriptors"] <= early["descriptors"] + 2, (early, late)
    assert late["threads"] <= early["threads"], (early, late)
    assert late["objects"] <= early["objects"] + OBJECTS_A_PEER * (last - first), (early, late)
    assert len(resident.transceiver.counts()) <= KEPT_PEERS + 2
    assert sum(counts.transfers for counts in resident.transceiver.counts()) == last
    assert resident.transceiver.staging_in_use_bytes == 0
    assert ucx_progress._kept == []


def settle(resident: Node) -> None:
    """Until the last peer's link is gone."""
    halves: Any = resident.transceiver._halves
    if halves._imports is not None:
        resident.wait_until(lambda: not halves._imports._links, "every sender's link is closed")
    if halves._exports is not None:
        peers = halves._exports._peers
        resident.wait_until(lambda: all(each.closed for links in peers.values() for each in links), "closed")


def test_a_sender_hangs_up_on_whom_it_needs_least(make_node: MakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoffs, "MAX_PEERS", 3)
    on_offer = accept_into(lambda key: TARGET)
    ctx = make_node(pool_tensor(BLOCKS, seed=1), "context-0", role="context")
    gens = [make_node(pool_tensor(BLOCKS, seed=None), f"g{n}", role="generation", on_offer=on_offer) for n in range(5)]

    def connected(n: int) -> bool:
        imports: Any = gens[n].transceiver._halves.imports
        return bool(imports._links)

    for turn, n in enumerate((0, 1, 2, 0, 3)):
        hand_over(ctx, gens[n], f"turn {turn}")
    ctx.wait_until(lambda: not connected(1), "the one that was needed longest ago is hung up on")
    assert [n for n in range(5) if connected(n)] == [0, 2, 3]
    hand_over(ctx, gens[1], "again")
    ctx.wait_until(lambda: [n for n in range(5) if connected(n)] == [0, 1, 3], "and comes back when it is needed")

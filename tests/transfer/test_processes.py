"""Two and three real processes: correct when all is well, and when a process dies or freezes mid-transfer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed
from pdserve.protocol import Key
from tests.transfer.faults import FaultyNetwork
from tests.transfer.harness import POISON, Node, accept_into, layout, num_blocks, pool_tensor, rows
from tests.transfer.networks import NETWORK, new_network
from tests.transfer.peer import blocks_from, peer

LARGE = layout(num_layers=8, num_kv_heads=8, head_dim=512)
"""Blocks of 512 KiB: enough to be caught while a transfer is under way."""

LARGE_BLOCKS = 64
STALL_S = 0.8


@pytest.fixture
def node() -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def make(*args: object, **options: object) -> Node:
        nodes.append(Node(*args, **options))  # type: ignore[arg-type]
        return nodes[-1]

    yield make
    for made in nodes:
        made.close()


class Strike:
    """A network that does something to a peer right before the `nth` message of that name is sent to it."""

    def __init__(self, name: str, nth: int) -> None:
        self._name, self._left = name, nth
        self.strike: Callable[[], None] = lambda: None
        self.struck = threading.Event()

    def __call__(self, config: CacheTransceiverConfig, device: torch.device) -> FaultyNetwork:
        return FaultyNetwork(self._decide, new_network(NETWORK))

    def _decide(self, name: str) -> None:
        self._left -= name == self._name
        if self._left == 0 and not self.struck.is_set():
            self.strike()
            self.struck.set()


def wait_for_peer(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.01)


def test_handoffs_of_odd_lengths_are_bit_exact(node: Callable[..., Node]) -> None:
    lengths = [1, 3, 4, 5, 31, 64, 99, 127, 128, 129]
    blocks = [0]
    for length in lengths:
        blocks.append(blocks[-1] + num_blocks(length))
    with peer(pool_tensor(blocks[-1] + 5, None), "generation-0", role="generation", staging_tokens=24) as gen:
        ctx = node(pool_tensor(blocks[-1], seed=9), "context-0", role="context", staging_tokens=40)
        keys = {Key(str(first), 0): length for first, length in zip(blocks, lengths, strict=False)}
        for key, length in keys.items():
            first = int(key.request_id)
            ctx.exporter.offer(key, gen.address, length, range(first, first + num_blocks(length)))
        for key in reversed(list(keys)):
            ctx.exporter.finish(key, 1)
        for key in keys:
            ctx.wait(ExportDone, key)
        wait_for_peer(lambda: {e.key for e in gen.events() if isinstance(e, ImportDone)} == set(keys), "all imports")
        assert torch.equal(rows(gen.tensor, range(blocks[-1])), rows(ctx.tensor, range(blocks[-1])))
        assert bool((rows(gen.tensor, range(blocks[-1], blocks[-1] + 5)) == POISON).all())
        ctx.assert_staging_free()
        assert gen.staging_in_use_bytes() == 0
        assert ctx.transceiver.counts()[0].transport


def test_a_killed_generation_worker_fails_its_handoffs_at_once(node: Callable[..., Node]) -> None:
    network = Strike("payload", nth=6)
    source = pool_tensor(LARGE_BLOCKS, 1, LARGE)
    ctx = node(source, "context-0", of=LARGE, role="context", staging_tokens=64, network=network)
    options = {"of": LARGE, "role": "generation", "staging_tokens": 64}
    with peer(pool_tensor(LARGE_BLOCKS, None, LARGE), "generation-0", **options) as gen:
        under_way, waiting = Key("0", 0), Key("1", 0)
        ctx.exporter.offer(under_way, gen.address, LARGE_BLOCKS * 4, range(LARGE_BLOCKS))
        ctx.exporter.offer(waiting, gen.address, 4, [0])
        network.strike = gen.kill
        ctx.exporter.finish(under_way, 1)
        for key in (under_way, waiting):
            assert ctx.wait(ExportFailed, key, 2.0).error.reason == "peer_lost"
            assert len(ctx.endings(key)) == 1
        ctx.assert_staging_free()
    with peer(pool_tensor(LARGE_BLOCKS, None, LARGE), "generation-1", **options) as gen:
        again = Key("0", 1)
        ctx.exporter.offer(again, gen.address, LARGE_BLOCKS * 4, range(LARGE_BLOCKS))
        ctx.exporter.finish(again, 1)
        ctx.wait(ExportDone, again)
        assert torch.equal(gen.tensor.view(torch.uint8), ctx.tensor.view(torch.uint8))


def test_a_killed_context_worker_fails_its_handoffs_at_once(node: Callable[..., Node]) -> None:
    options = {"of": LARGE, "staging_tokens": 64}
    network = Strike("Grant", nth=6)
    gen = node(
        pool_tensor(LARGE_BLOCKS, None, LARGE),
        "generation-0",
        role="generation",
        on_offer=accept_into(blocks_from),
        network=network,
        **options,
    )
    with peer(pool_tensor(LARGE_BLOCKS, 1, LARGE), "context-0", role="context", **options) as ctx:
        key = Key("0", 0)
        network.strike = ctx.kill
        ctx.offer(key, gen.address, LARGE_BLOCKS * 4, range(LARGE_BLOCKS), computed=LARGE_BLOCKS * 4 - 1)
        assert gen.wait(ImportFailed, key, 2.0).error.reason == "peer_lost"
        gen.assert_staging_free()


@pytest.mark.parametrize(("frame", "nth"), [("Offer", 1), ("payload", 6)])
def test_a_frozen_generation_worker_times_out_while_another_goes_on(
    node: Callable[..., Node], frame: str, nth: int
) -> None:
    network = Strike(frame, nth)
    ctx = node(
        pool_tensor(LARGE_BLOCKS, 1, LARGE),
        "context-0",
        of=LARGE,
        role="context",
        staging_tokens=16,
        network=network,
        stall_timeout_s=STALL_S,
    )
    options = {"of": LARGE, "role": "generation", "staging_tokens": 64}
    with (
        peer(pool_tensor(LARGE_BLOCKS, None, LARGE), "frozen", **options) as frozen,
        peer(pool_tensor(LARGE_BLOCKS, None, LARGE), "lively", **options) as lively,
    ):
        stuck, waiting = Key("0", 0), Key("1", 0)
        network.strike = frozen.freeze
        ctx.exporter.offer(stuck, frozen.address, LARGE_BLOCKS * 4, range(LARGE_BLOCKS))
        ctx.exporter.finish(stuck, 1)
        assert network.struck.wait(10)
        ctx.exporter.offer(waiting, frozen.address, 4, [0])
        for first in (4, 8, 12, 16):
            ctx.exporter.offer(Key(str(first), 0), lively.address, 16, range(first, first + 4))
            ctx.exporter.finish(Key(str(first), 0), 1)
        for first in (4, 8, 12, 16):
            ctx.wait(ExportDone, Key(str(first), 0), 2 * STALL_S + 1)
        assert ctx.wait(ExportFailed, stuck, 2 * STALL_S + 1).error.reason == "timeout"
        assert ctx.wait(ExportFailed, waiting, 1.0).error.reason == "timeout"
        ctx.assert_staging_free()
        assert torch.equal(rows(lively.tensor, range(4, 20)), rows(ctx.tensor, range(4, 20)))


@pytest.mark.parametrize(("frame", "nth"), [("Accept", 1), ("Grant", 6)])
def test_a_frozen_context_worker_times_out_while_another_goes_on(
    node: Callable[..., Node], frame: str, nth: int
) -> None:
    options = {"of": LARGE, "staging_tokens": 16}
    network = Strike(frame, nth)
    gen = node(
        pool_tensor(LARGE_BLOCKS, None, LARGE),
        "generation-0",
        role="generation",
        on_offer=accept_into(blocks_from),
        network=network,
        stall_timeout_s=STALL_S,
        **options,
    )
    with (
        peer(pool_tensor(LARGE_BLOCKS, 1, LARGE), "frozen", role="context", **options) as frozen,
        peer(pool_tensor(LARGE_BLOCKS, 2, LARGE), "lively", role="context", **options) as lively,
    ):
        stuck = Key("0", 0)
        network.strike = frozen.freeze
        frozen.offer(stuck, gen.address, 160, range(40), computed=159)
        assert network.struck.wait(10)
        for first in (40, 50):
            lively.offer(Key(str(first), 0), gen.address, 40, range(first, first + 10), computed=40)
        for first in (40, 50):
            gen.wait(ImportDone, Key(str(first), 0), 2 * STALL_S + 1)
        assert gen.wait(ImportFailed, stuck, 2 * STALL_S + 1).error.reason == "timeout"
        gen.assert_staging_free()
        assert torch.equal(rows(gen.tensor, range(40, 60)), rows(lively.tensor, range(40, 60)))
        wait_for_peer(lambda: len(lively.events()) == 2, "the lively worker's events")

"""A transceiver that can't go on says so, once, by a typed error: its worker must end, or it fails every handoff."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kv_transfer.ranks.relay import InProcessRelay
from pdserve.errors import PdserveError, TransferError
from pdserve.handoff import ExportDone, ExportFailed, ImportDone
from pdserve.protocol import Key
from tests.transfer.harness import MakeNode, Node, accept_into, context, generation, nodes
from tests.transfer.networks import SIMPLE
from tests.transfer.ranked import PLAIN, TARGET, MakeWorker, assert_arrived, offer, pair, workers
from tests.transfer.shards import worker

make = pytest.fixture(workers)
make_node = pytest.fixture(params=[SIMPLE])(nodes)

BRIEF: dict[str, Any] = {"timeout_ms": 300, "stall_timeout_s": 0.2, "grace_s": 0.2}


class Failures(list[PdserveError]):
    """What transceivers have said of their end."""

    def __call__(self, error: PdserveError) -> None:
        self.append(error)

    def wait(self, timeout_s: float = 15.0) -> PdserveError:
        wait_until(lambda: bool(self), timeout_s)
        return self[0]


def end_thread(node: Node) -> None:
    """As an error in its root does."""
    loop = node.transceiver._loop

    def end() -> None:
        main = [task for task in asyncio.all_tasks(loop) if "_main" in repr(task.get_coro())]
        assert len(main) == 1
        main[0].cancel()

    loop.call_soon_threadsafe(end)


def wait_until(happened: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize("role", [context, generation])
def test_a_thread_that_ends_by_an_error_is_told(make_node: MakeNode, role: Callable[..., Any]) -> None:
    failures = Failures()
    node = role(make_node, on_failure=failures)
    assert not failures
    end_thread(node)
    assert isinstance(failures.wait(), TransferError)
    node.close()
    assert len(failures) == 1


def test_one_that_can_not_start_says_so_to_its_starter_alone(make_node: MakeNode) -> None:
    failures, taken = Failures(), generation(make_node)
    with pytest.raises(OSError, match=r"taken|listen"):
        generation(make_node, port=taken.address.port, on_failure=failures)
    assert not failures


def test_a_transceiver_that_is_closed_has_not_failed(make_node: MakeNode) -> None:
    failures = Failures()
    node = context(make_node, on_failure=failures)
    node.close()
    assert not failures


def test_a_network_that_can_not_go_on_fails_its_transceiver(make_node: MakeNode) -> None:
    failures = Failures()
    node = context(make_node, on_failure=failures)
    network, error = node.transceiver._network, TransferError("it keeps our buffers", "aborted")
    assert network is not None
    node.transceiver._loop.call_soon_threadsafe(node.transceiver._fail, error)
    node.transceiver._loop.call_soon_threadsafe(node.transceiver._fail, error)
    assert failures.wait() is error
    node.close()
    assert len(failures) == 1


def test_a_rank_that_falls_silent_for_good_ends_the_worker_without_any_handoff(make: MakeWorker) -> None:
    failures = Failures()
    ctx = make(worker(2, [5], **PLAIN), "c", "context", on_failure=failures, **(BRIEF | {"timeout_ms": 1000}))
    time.sleep(1.5)
    assert not failures, "a rank that is idle says that it is there"
    ctx.relays[1].hold = True
    assert "rank 1 of this worker is lost: it has said nothing" in str(failures.wait())
    key = Key("r", 0)
    ctx.exporter.offer(key, ctx.address, 4, [1])
    assert "rank 1" in str(ctx.wait(ExportFailed, key).error)
    assert len(failures) == 1


def test_a_rank_that_does_not_end_a_handoff_ends_the_worker(make: MakeWorker) -> None:
    failures = Failures()
    gen = make(worker(2, [5], **PLAIN), "g", "generation", on_offer=accept_into(lambda key: TARGET), **BRIEF)
    ctx = make(worker(2, [5], **PLAIN), "c", "context", on_failure=failures, **BRIEF)
    ctx.relays[1].hold = True
    key = Key("r", 0)
    offer(ctx, gen, key, 20)
    ctx.exporter.finish(key, 1)
    assert "rank 1 of this worker is lost" in str(ctx.wait(ExportFailed, key).error)
    assert "rank 1 of this worker is lost" in str(failures.wait())


def test_a_follower_whose_thread_ends_is_told_on_its_own_rank(make: MakeWorker) -> None:
    failures = Failures()
    ctx = make(worker(2, [5], **PLAIN), "c", "context", of_rank={1: {"on_failure": failures}})
    end_thread(ctx.nodes[1])
    failures.wait()


@pytest.mark.parametrize(
    "frame", [b"\xc1", b"", b"\x91" * 100_000, b"\x93\x03\xff\x90"], ids=["no", "empty", "deep", "rank"]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_make_no_sense_to_each_other_end_the_worker(make: MakeWorker, frame: bytes, rank: int) -> None:
    failures = Failures()
    ctx = make(worker(2, [5], **PLAIN), "c", "context", on_failure=failures)
    relay = ctx.relays[rank]
    assert isinstance(relay, InProcessRelay)
    relay.deliver(frame)
    assert isinstance(failures.wait(), TransferError)


def test_one_rank_that_is_slow_but_there_is_not_lost(make: MakeWorker) -> None:
    failures = Failures()
    ctx, gen = pair(
        make, on_offer=accept_into(lambda key: TARGET), on_failure=failures, **(BRIEF | {"timeout_ms": 10_000})
    )
    ctx.relays[1].hold = True
    threading.Timer(1.2, ctx.relays[1].release).start()
    key = Key("r", 0)
    cache = offer(ctx, gen, key, 20)
    ctx.exporter.finish(key, 1)
    gen.wait(ImportDone, key)
    ctx.wait(ExportDone, key)
    assert_arrived(gen, cache)
    assert not failures

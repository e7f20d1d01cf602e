"""Every rank in a process of its own, joined by ZMQ, and the KV between them over UCX."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.layout import KvLayout
from kv_transfer.ranks.place import place
from pdserve.handoff import ExportDone, ExportFailed, ImportDone, ImportFailed
from pdserve.protocol import Key
from tests.transfer.harness import Node
from tests.transfer.peer import Peer, peer
from tests.transfer.shards import assert_holds, empty_pool, fill, whole_cache, worker

PLAIN: dict[str, Any] = {
    "model": "m",
    "num_layers": 4,
    "kv_factor": 2,
    "num_kv_heads": 2,
    "head_dim": 32,
    "tokens_per_block": 8,
    "dtype": "bfloat16",
}
ONE, TWO = worker(1, [4], **PLAIN), worker(2, [4], **PLAIN)
CASES = {
    "tp 1 to 2": (ONE, TWO),
    "tp 2 to 1": (TWO, ONE),
    "tp 2 to 2": (TWO, TWO),
    "pp 2 to 1": (worker(1, [1, 3], **PLAIN), ONE),
}
BLOCKS = 30
ENDED = (ImportDone, ImportFailed)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def start_peers(
    stack: ExitStack, layouts: list[KvLayout], first: int, folder: Path, worker_id: str, **options: Any
) -> list[Peer]:
    """Processes for the ranks from `first` on."""
    folder.mkdir(exist_ok=True)
    grace_s = options.pop("grace_s", 5.0)
    if len(layouts) == 1:
        return [stack.enter_context(peer(empty_pool(layouts[0], BLOCKS), worker_id, of=layouts[0], **options))]
    return [
        stack.enter_context(
            peer(
                empty_pool(layouts[rank], BLOCKS),
                worker_id,
                of=layouts[rank],
                place=(folder, rank, len(layouts), grace_s),
                **options,
            )
        )
        for rank in range(first, len(layouts))
    ]


def start(stack: ExitStack, senders: list[KvLayout], receivers: list[KvLayout], path: Path, **options: Any) -> Any:
    """Both workers: the context worker's rank 0 in this process, the others elsewhere. That node, the
    peers of the generation worker, and those of the context worker."""
    gen = start_peers(stack, receivers, 0, path / "g", "generation-0", role="generation", **options)
    grace_s, own = options.pop("grace_s", 5.0), path / "c"
    followers = start_peers(stack, senders, 1, own, "context-0", role="context", **options) if senders[1:] else []
    ranks = place(own, 0, len(senders), grace_s)
    node = Node(empty_pool(senders[0], BLOCKS), "context-0", of=senders[0], role="context", ranks=ranks, **options)
    stack.callback(node.close)
    return node, gen, followers


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.mark.parametrize(("senders", "receivers"), CASES.values(), ids=list(CASES))
def test_kv_crosses_between_processes_of_any_ranks(
    stack: ExitStack, tmp_path: Path, senders: list[KvLayout], receivers: list[KvLayout]
) -> None:
    ctx, gen, followers = start(stack, senders, receivers, tmp_path, staging_tokens=32)
    pools = [ctx.tensor, *(each.tensor for each in followers)]
    lengths = {Key("0", 0): 50, Key("8", 0): 64, Key("17", 0): 99}
    caches = {}
    for key, num_tokens in lengths.items():
        first = int(key.request_id)
        blocks = list(range(first, first + -(-num_tokens // 8)))
        caches[key] = whole_cache(senders[0], num_tokens, first)
        for pool, layout in zip(pools, senders, strict=True):
            fill(pool, layout, blocks, caches[key])
        ctx.exporter.offer(key, gen[0].address, num_tokens, blocks)
        ctx.exporter.computed(key, 33)
    for key in reversed(lengths):
        ctx.exporter.finish(key, 7)
    for key in lengths:
        ctx.wait(ExportDone, key)
    wait_for(lambda: sum(isinstance(event, ENDED) for event in gen[0].events()) == len(lengths))
    assert {event.key for event in gen[0].events() if isinstance(event, ImportDone)} == set(lengths)
    for each, layout in zip(gen, receivers, strict=True):
        wait_for(lambda each=each: not each.staging_in_use_bytes())  # rank 0 hears of the others' now and then
        for key, cache in caches.items():
            first = int(key.request_id)
            blocks = list(range(first, first + -(-cache.shape[3] // 8)))
            others = [block for block in range(BLOCKS) if block not in blocks]
            alone = each.tensor.clone()
            alone[others] = empty_pool(layout, 1)[0]
            assert_holds(alone, layout, blocks, cache, 0, exact_tail=False)


@pytest.mark.parametrize("side", ["context", "generation"])
def test_a_killed_follower_ends_what_its_worker_was_at(stack: ExitStack, tmp_path: Path, side: str) -> None:
    node, gen, followers = start(stack, TWO, TWO, tmp_path, timeout_ms=800, stall_timeout_s=0.4, grace_s=0.2)
    key = Key("0", 0)
    node.exporter.offer(key, gen[0].address, 64, range(8))
    node.exporter.computed(key, 40)
    wait_for(lambda: bool(node.transceiver.counts()) and node.transceiver.counts()[0].bytes > 0)
    (followers[0] if side == "context" else gen[1]).kill()
    assert isinstance(node.wait_ending(key), ExportFailed)
    wait_for(lambda: any(isinstance(event, ImportFailed) for event in gen[0].events()))
    node.assert_staging_free()
    wait_for(lambda: gen[0].staging_in_use_bytes() == 0)
    assert len(node.endings(key)) == 1

"""A worker of several ranks in this process: a `Node` for each, joined by an in-process relay that a test may hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kv_transfer.layout import KvLayout
from kv_transfer.ranks.follower import Follower
from kv_transfer.ranks.leader import Leader
from kv_transfer.ranks.relay import InProcessRelay, in_process
from pdserve.handoff import HandoffEvent, ImportOffered
from pdserve.protocol import Key, KvAddress
from tests.transfer.harness import Node
from tests.transfer.shards import assert_holds, empty_pool, fill, whole_cache, worker

MODEL: dict[str, Any] = {"model": "m", "num_layers": 5, "kv_factor": 2, "num_kv_heads": 3, "head_dim": 4}
PLAIN: dict[str, Any] = MODEL | {"tokens_per_block": 4, "dtype": "bfloat16"}
SOURCE, TARGET = list(range(30, 10, -1)), list(range(3, 23))


class HeldRelay(InProcessRelay):
    """A follower's end, which a test can make keep what it would send."""

    def __init__(self) -> None:
        super().__init__()
        self.hold = False
        self._held: list[bytes] = []

    def send(self, frame: bytes) -> None:
        if self.hold:
            self._held.append(frame)
        else:
            super().send(frame)

    def release(self) -> None:
        self.hold = False
        for frame in self._held:
            super().send(frame)
        self._held.clear()


class Worker:
    """All ranks, started. `options` are each `Node`'s; `of_rank` gives some ranks options of their own."""

    def __init__(
        self,
        layouts: Sequence[KvLayout],
        worker_id: str,
        role: str,
        num_blocks: int = 40,
        grace_s: float = 5.0,
        on_offer: Callable[[Node, ImportOffered], None] | None = None,
        of_rank: dict[int, dict[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        self.layouts = list(layouts)
        self.pools = [empty_pool(each, num_blocks) for each in layouts]
        self.relays: list[Any] = in_process(len(layouts))
        for rank in range(1, len(layouts)):
            held = HeldRelay()
            held.others = [self.relays[0]]
            self.relays[rank] = self.relays[0].others[rank - 1] = held
        self.nodes: list[Node] = []
        for rank in reversed(range(len(layouts))):
            place: Any = None
            if len(layouts) > 1:
                follows = rank > 0
                place = Follower(self.relays[rank], rank) if follows else Leader(self.relays[0], len(layouts), grace_s)
            own = options | (of_rank or {}).get(rank, {})
            offered = on_offer if rank == 0 else None
            node = Node(self.pools[rank], worker_id, of=layouts[rank], role=role, ranks=place, on_offer=offered, **own)
            self.nodes.insert(0, node)
        self.leader = self.nodes[0]
        self.exporter, self.importer = self.leader.exporter, self.leader.importer
        self.address: KvAddress = self.leader.address

    def compute(self, block_ids: Sequence[int], num_tokens: int, seed: int = 0) -> Any:
        """Put KV of a sequence into every rank's pool; returns the whole."""
        cache = whole_cache(self.layouts[0], num_tokens, seed)
        for pool, each in zip(self.pools, self.layouts, strict=True):
            fill(pool, each, block_ids, cache)
        return cache

    def launch(self, *ranks: int) -> None:
        """A step is launched on these ranks; on all, if none are named."""
        for rank in ranks or range(len(self.nodes)):
            self.nodes[rank].transceiver.steps.launched()

    def wait(self, kind: type[Any], key: Key, timeout_s: float = 60.0) -> Any:
        return self.leader.wait(kind, key, timeout_s)

    def endings(self, key: Key) -> list[HandoffEvent]:
        return self.leader.endings(key)

    def assert_staging_free(self) -> None:
        for node in self.nodes:
            node.assert_staging_free()

    def close(self) -> None:
        for node in self.nodes:
            node.close()


MakeWorker = Callable[..., Worker]


def workers() -> Iterator[MakeWorker]:
    """A fixture: makes workers over loopback, and closes them."""
    made: list[Worker] = []

    def make_worker(*args: Any, **options: Any) -> Worker:
        made.append(Worker(*args, **({"backend": "LOOPBACK"} | options)))
        return made[-1]

    yield make_worker
    for each in made:
        each.close()


def pair(make: MakeWorker, sender: Any = (2, [5]), receiver: Any = (2, [5]), **options: Any) -> tuple[Worker, Worker]:
    """A context and a generation worker; `sender` and `receiver` are tensor parallelism and layers of each stage."""
    ctx = make(worker(*sender, **PLAIN), "context-0", "context", **options)
    return ctx, make(worker(*receiver, **PLAIN), "generation-0", "generation", **options)


def offer(ctx: Worker, gen: Worker, key: Key, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """Compute a sequence and offer it; returns its KV."""
    cache: torch.Tensor = ctx.compute(SOURCE, num_tokens, seed)
    ctx.exporter.offer(key, gen.address, num_tokens, SOURCE)
    return cache


def assert_arrived(gen: Worker, cache: torch.Tensor) -> None:
    for pool, each in zip(gen.pools, gen.layouts, strict=True):
        assert_holds(pool, each, TARGET, cache, 0, exact_tail=False)

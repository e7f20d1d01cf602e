"""Small pools, and transceivers whose events a test can wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import torch

from context_worker.exporter import Exporter
from context_worker.handoffs import Exports
from generation_worker.handoffs import Imports
from generation_worker.importer import Importer
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView
from kv_transfer.options import TransceiverOptions
from kv_transfer.transceiver import Transceiver
from pd_kernels.kv_pack import pool_with_margins
from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ExportFailed, HandoffEvent, ImportDone, ImportFailed, ImportOffered
from pdserve.protocol import Key, KvAddress, Phase
from tests.transfer.networks import NETWORK

TOKENS_PER_BLOCK = 4
POISON = 0x5A
ENDINGS = (ExportDone, ExportFailed, ImportDone, ImportFailed)

Event = TypeVar("Event", bound=HandoffEvent)


def layout(**changes: Any) -> KvLayout:
    """One group. A block of 3 layers, K and V, 2 heads, 4 tokens, head size 5, float16: 480 bytes."""
    fields: dict[str, Any] = {
        "num_layers": 3,
        "kv_factor": 2,
        "num_kv_heads": 2,
        "tokens_per_block": TOKENS_PER_BLOCK,
        "head_dim": 5,
        "dtype": "float16",
    }
    return one_group(**({"model": "test"} | fields | changes))


def one_group(model: str, weights: str = "", **fields: Any) -> KvLayout:
    """A cache whose layers are all alike."""
    return KvLayout(model=model, weights=weights, groups=(GroupLayout(**fields),))


def only(of: KvLayout) -> GroupLayout:
    """The group of a cache that has one."""
    (group,) = of.groups
    return group


def pool_tensor(num_blocks: int, seed: int | None, of: KvLayout | None = None) -> torch.Tensor:
    """Random bytes, or poison without a seed. Bytes, for NaNs and denormals must travel as they are."""
    group = only(of or layout())
    tensor = pool_with_margins((num_blocks, *group.block_shape), getattr(torch, group.dtype))
    raw = tensor.view(num_blocks, -1).view(torch.uint8)
    if seed is None:
        raw.fill_(POISON)
    else:
        raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    return tensor


def rows(tensor: torch.Tensor, block_ids: Sequence[int]) -> torch.Tensor:
    """The named blocks as bytes, `[n, block_bytes]`."""
    return tensor.view(tensor.shape[0], -1).view(torch.uint8)[list(block_ids)]


def num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // TOKENS_PER_BLOCK)


class OneGroupExporter(Exporter):
    """Takes blocks, not tables."""

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, blocks: Sequence[int]) -> None:  # type: ignore[override]
        super().offer(key, peer, num_tokens, (blocks,))


class OneGroupImporter(Importer):
    """Takes blocks, not tables."""

    def accept(self, key: Key, blocks: Sequence[int], num_cached_tokens: int) -> None:  # type: ignore[override]
        super().accept(key, (blocks,), num_cached_tokens)


class Node:
    """A transceiver over `tensor`, started. `on_offer` may accept; it runs in the transceiver's thread."""

    def __init__(
        self,
        tensor: torch.Tensor,
        worker_id: str,
        *,
        of: KvLayout | None = None,
        on_offer: Callable[[Node, ImportOffered], None] | None = None,
        pools: Sequence[torch.Tensor] = (),
        role: Phase = "both",
        port: int = 0,
        backend: str = NETWORK,
        timeout_ms: int = 10_000,
        staging_tokens: int = 64,
        checksum: bool = True,
        direct_reads: bool = False,
        **options: Any,
    ) -> None:
        self.tensor = tensor
        self.direct_reads = direct_reads
        self.events: list[HandoffEvent] = []
        self._on_offer = on_offer
        self._changed = threading.Condition()
        config = CacheTransceiverConfig(
            backend=backend,
            kv_transfer_timeout_ms=timeout_ms,
            max_tokens_in_buffer=staging_tokens,
            checksum=checksum,
            direct_reads=direct_reads,
        )
        pool = KvPoolView(pools or (tensor,), of or layout())
        own = {name: options.pop(name) for name in ("stall_timeout_s", "network") if name in options}
        self.transceiver = Transceiver(
            pool,
            config,
            TransceiverOptions(worker_id, "127.0.0.1", port=port, **own),
            self._post,
            exports=Exports() if role != "generation" else None,
            imports=Imports() if role != "context" else None,
            **options,
        )
        self.exporter = OneGroupExporter(self.transceiver)
        self.importer = OneGroupImporter(self.transceiver)
        self.address: KvAddress = self.transceiver.start()

    def _post(self, event: HandoffEvent) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
        if isinstance(event, ImportOffered) and self._on_offer is not None:
            self._on_offer(self, event)

    def wait(self, kind: type[Event], key: Key, timeout_s: float = 60.0) -> Event:
        """The event of that kind for `key`; fails at once when another ending came instead."""

        def ready() -> bool:
            return any(e.key == key and isinstance(e, (kind, *ENDINGS)) for e in self.events)

        with self._changed:
            assert self._changed.wait_for(ready, timeout_s), f"no {kind.__name__} for {key}; came: {self.events}"
            found = [e for e in self.events if e.key == key and isinstance(e, kind)]
            assert found, f"not {kind.__name__} but {[e for e in self.events if e.key == key]}"
            return found[0]

    def wait_ending(self, key: Key, timeout_s: float = 60.0) -> HandoffEvent:
        with self._changed:
            came = self._changed.wait_for(lambda: bool(self.endings(key)), timeout_s)
            assert came, f"{key} did not end; came: {self.events}"
            return self.endings(key)[0]

    def endings(self, key: Key) -> list[HandoffEvent]:
        return [event for event in self.events if event.key == key and isinstance(event, ENDINGS)]

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        waited = threading.Event()
        for _ in range(int(timeout_s / 0.01)):
            if condition():
                return
            waited.wait(0.01)
        raise AssertionError(f"not within {timeout_s} s: {what}")

    def assert_staging_free(self) -> None:
        self.wait_until(lambda: self.transceiver.staging_in_use_bytes == 0, "all staging buffers back")

    def is_connecting(self) -> bool:
        """Whether a link to a receiver is being made."""
        exports: Any = self.transceiver._halves._exports
        peers = [] if exports is None else list(exports._peers.values())
        return any(link._up is None and not link.closed for links in peers for link in list(links))

    def failures(self) -> dict[str, int]:
        merged: dict[str, int] = {}
        for counts in self.transceiver.counts():
            for reason, count in counts.failures.items():
                merged[reason] = merged.get(reason, 0) + count
        return merged

    def close(self) -> None:
        self.transceiver.close()


def accept_into(blocks_of: Callable[[Key], Sequence[int]], cached: Callable[[Key], int] = lambda key: 0):
    """An `on_offer` that accepts every offer at once."""

    def on_offer(node: Node, event: ImportOffered) -> None:
        node.importer.accept(event.key, blocks_of(event.key), cached(event.key))

    return on_offer


MakeNode = Callable[..., Node]
DIRECT = ", direct"
"""After a backend's name: where pools are alike, KV is read where it is."""

BLOCKS = 64


def nodes(request: pytest.FixtureRequest) -> Iterator[MakeNode]:
    """A fixture over backends: makes nodes, and closes them."""
    made: list[Node] = []

    def make(tensor: torch.Tensor, worker_id: str, **options: object) -> Node:
        options.setdefault("backend", request.param.removesuffix(DIRECT))
        options.setdefault("direct_reads", request.param.endswith(DIRECT))
        made.append(Node(tensor, worker_id, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for node in made:
        node.close()


def context(make_node: MakeNode, **options: object) -> Node:
    return make_node(pool_tensor(BLOCKS, seed=1), "context-0", role="context", **options)


def generation(make_node: MakeNode, **options: object) -> Node:
    return make_node(pool_tensor(BLOCKS, seed=None), "generation-0", role="generation", **options)


def assert_only_written(tensor: torch.Tensor, written: Sequence[int]) -> None:
    others = [block for block in range(tensor.shape[0]) if block not in written]
    assert bool((rows(tensor, others) == POISON).all())

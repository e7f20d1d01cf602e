"""A worker of a world: its transceivers, and the books of its blocks as an engine keeps them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kv_transfer.layout import KvLayout
from pd_kernels.kv_pack.reference import bits, convert
from pdserve.handoff import ExportDone, HandoffEvent, ImportDone, ImportOffered
from pdserve.protocol import Key
from tests.transfer.chaos.script import Script, ScriptedNetwork
from tests.transfer.faults import SLEEPS_S
from tests.transfer.harness import POISON, only
from tests.transfer.ranked import Worker
from tests.transfer.shards import held

BLOCKS = 256
TIMEOUT_S = 1.2
STALL_S = 0.4
GRACE_S = 1.0
HELD_RELAY_S = 0.2


class Site:
    """Blocks that are free are poison; whoever takes some finds them so, or somebody wrote to them who must not."""

    def __init__(
        self,
        worker_id: str,
        role: str,
        layouts: Sequence[KvLayout],
        script: Script,
        direct_reads: bool,
        ports: Sequence[int] = (),
    ) -> None:
        self.worker_id = worker_id
        self.layouts = list(layouts)
        self._role = role
        self._script = script
        self.ended = False
        self.direct_reads = direct_reads
        self._networks = [ScriptedNetwork(worker_id, script) for _ in layouts]
        self._free = list(range(BLOCKS))
        self._lock = threading.Lock()
        self.worker = Worker(
            layouts,
            worker_id,
            role,
            num_blocks=BLOCKS,
            grace_s=GRACE_S,
            of_rank={rank: self._options(rank, ports) for rank in range(len(layouts))},
            backend="LOOPBACK",
            timeout_ms=round(TIMEOUT_S * 1000),
            stall_timeout_s=STALL_S,
            staging_tokens=32,
            direct_reads=direct_reads,
        )
        for port in self._ports():
            script.workers[port] = worker_id

    def take(self, num_tokens: int) -> list[int]:
        """Blocks for so many tokens, the last that were given back first."""
        with self._lock:
            taken = [self._free.pop() for _ in range(-(-num_tokens // only(self.layouts[0]).tokens_per_block))]
        self.assert_poison(taken)
        return taken

    def give_back(self, block_ids: Sequence[int]) -> None:
        """Nobody may read or write them any more."""
        for pool in self.worker.pools:
            pool.view(torch.uint8)[list(block_ids)] = POISON
        with self._lock:
            self._free += block_ids

    def assert_poison(self, block_ids: Sequence[int]) -> None:
        for pool in self.worker.pools:
            assert bool((pool.view(torch.uint8)[list(block_ids)] == POISON).all()), (
                "a block that is free was written to"
            )

    def assert_holds(self, block_ids: Sequence[int], cache: Tensor, cached_tokens: int) -> None:
        """Each rank has its part of `cache` after the first tokens, whose blocks are as they were."""
        tokens = range(cached_tokens, cache.shape[3])
        for pool, of in zip(self.worker.pools, self.layouts, strict=True):
            own = bits(convert(cache, pool.dtype))[slice(*only(of).layers), :, slice(*only(of).kv_heads)]
            expected = own[:, :, :, tokens.start :].permute(3, 0, 1, 2, 4)
            assert torch.equal(held(pool, of, block_ids, tokens), expected), "the KV that came is not what was sent"
        self.assert_poison(block_ids[: cached_tokens // only(self.layouts[0]).tokens_per_block])

    def ending(self, key: Key) -> HandoffEvent | None:
        return next(iter(self.worker.endings(key)), None)

    def was_offered(self, key: Key) -> bool:
        return any(isinstance(event, ImportOffered) and event.key == key for event in list(self.worker.leader.events))

    def is_quiet(self) -> bool:
        """Whether nothing is under way: no handoff, no buffer in use, no connection being made."""
        return all(
            not node.transceiver.staging_in_use_bytes
            and not any(counts.in_flight for counts in node.transceiver.counts())
            and not node.is_connecting()
            for node in self.worker.nodes
        )

    def assert_at_rest(self) -> None:
        assert len(self._free) == BLOCKS, f"{self.worker_id} lost {BLOCKS - len(self._free)} blocks"
        self.assert_poison(range(BLOCKS))
        for node in self.worker.nodes:
            node.events.clear()

    def freeze(self, rank: int) -> None:
        """Stop a rank's thread for longer than its peers will wait; returns when it goes on."""
        goes_on = threading.Event()
        self._loop(rank).call_soon_threadsafe(time.sleep, SLEEPS_S["freeze"])
        self._loop(rank).call_soon_threadsafe(goes_on.set)
        goes_on.wait(2 * SLEEPS_S["freeze"])

    def hold_relay(self, rank: int) -> None:
        """What a follower has to say to rank 0 takes its time."""
        relay = self.worker.relays[rank]
        relay.hold = True
        time.sleep(HELD_RELAY_S)
        self._loop(rank).call_soon_threadsafe(relay.release)

    def kill(self) -> None:
        """Its peers get no word, only the loss of every link."""
        for rank, network in enumerate(self._networks):
            self._loop(rank).call_soon_threadsafe(network.sever)
        self.close()

    def close(self) -> None:
        """Its end, in order."""
        self.ended = True
        self.worker.close()

    def reborn(self) -> Site:
        """The same worker started again, with a new pool at the old address."""
        return Site(self.worker_id, self._role, self.layouts, self._script, self.direct_reads, self._ports())

    def _ports(self) -> list[int]:
        address = self.worker.address
        ports = [rank.port for rank in address.ranks] or [address.port]
        return ports if ports[0] else []

    def _loop(self, rank: int) -> Any:
        return self.worker.nodes[rank].transceiver._loop

    def _options(self, rank: int, ports: Sequence[int]) -> dict[str, Any]:
        def network(config: object, device: object) -> ScriptedNetwork:
            return self._networks[rank]

        return {"network": network, "port": ports[rank] if ports else 0}


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return condition()
        time.sleep(0.004)
    return True


def outcome_of(ending: HandoffEvent | None) -> str:
    """A word for how a handoff ended on one side."""
    if ending is None:
        return "unheard"
    return "done" if isinstance(ending, ExportDone | ImportDone) else str(ending.error.reason)  # type: ignore[union-attr]

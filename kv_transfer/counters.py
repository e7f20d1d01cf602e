"""What was moved to and from each peer, and how it failed. Written by the transceiver's thread, read by any.

Peers come and go under new names. Of the peers without a connection, only the last `KEPT_PEERS` are counted by name;
the counts of those before them are added up under `OTHERS`, so that no sum ever falls.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Literal

import msgspec

from pdserve.distribution import BANDWIDTH_BOUNDS_GB_S, WAIT_BOUNDS_S, Distribution
from pdserve.handoff import HandoffCost
from pdserve.protocol import TransferCounts

Direction = Literal["sent", "received"]

OTHERS = "(others)"
"""Stands in the place of a peer's name for all peers that are not counted by name any more. No worker has such an
id."""

KEPT_PEERS = 64


class BusyClock:
    """The time in which at least one of several things was under way."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.began_s: float | None = None
        self._under_way = 0
        self._since_s = 0.0

    @property
    def is_running(self) -> bool:
        return self._under_way > 0

    def start(self) -> None:
        if self._under_way == 0:
            self._since_s = time.monotonic()
            if self.began_s is None:
                self.began_s = self._since_s
        self._under_way += 1

    def add(self, seconds: float) -> None:
        """Somebody else has measured so much."""
        self.seconds += seconds

    def stop(self) -> None:
        self._under_way -= 1
        if self._under_way == 0:
            self.seconds += time.monotonic() - self._since_s


class PeerCounter:
    """One peer and direction. `seconds` is the time in which at least one payload was under way. A connection holds its
    counters for as long as it lives."""

    def __init__(self, peer: str, direction: Direction, backend: str, lock: threading.Lock) -> None:
        self.peer = peer
        self._direction = direction
        self._backend = backend
        self._lock = lock
        self._transport = ""
        self._bytes = 0
        self._busy = BusyClock()
        self._transfers = 0
        self._handoffs = 0
        self._held = 0
        self._failures: Counter[str] = Counter()
        self._bandwidth_gb_s = self._exposed_s = self._block_wait_s = Distribution()

    @property
    def is_in_use(self) -> bool:
        """Whether more may be counted. Under the lock."""
        return self._held > 0 or self._handoffs > 0 or self._busy.is_running

    def hold(self) -> None:
        with self._lock:
            self._held += 1

    def let_go(self) -> None:
        with self._lock:
            self._held -= 1

    def handoff_started(self) -> None:
        with self._lock:
            self._handoffs += 1

    def handoff_ended(self, reason: str | None) -> None:
        """`reason` is None for one that completed."""
        with self._lock:
            self._handoffs -= 1
            if reason is None:
                self._transfers += 1
            else:
                self._failures[reason] += 1

    def payload_started(self) -> None:
        with self._lock:
            self._busy.start()

    def payload_ended(self) -> None:
        with self._lock:
            self._busy.stop()

    def payload_took(self, seconds: float) -> None:
        """As the peer says, which has read it."""
        with self._lock:
            self._busy.add(seconds)

    def moved(self, nbytes: int, transport: str) -> None:
        """A payload of `nbytes` was sent, or came and was found whole."""
        with self._lock:
            self._bytes += nbytes
            self._transport = transport or self._transport

    def completed(self, cost: HandoffCost) -> None:
        """A handoff is complete on all ranks. Bandwidth is that of the time in which its payload was under way."""
        with self._lock:
            if cost.nbytes and cost.busy_s:
                gb_per_s = cost.nbytes / cost.busy_s / 1e9
                self._bandwidth_gb_s = self._bandwidth_gb_s.plus(gb_per_s, BANDWIDTH_BOUNDS_GB_S)
            self._exposed_s = self._exposed_s.plus(cost.exposed_s, WAIT_BOUNDS_S)
            self._block_wait_s = self._block_wait_s.plus(cost.waited_s, WAIT_BOUNDS_S)

    def snapshot(self) -> TransferCounts:
        """Under the lock."""
        return TransferCounts(
            peer=self.peer,
            direction=self._direction,
            backend=self._backend,
            transport=self._transport,
            bytes=self._bytes,
            seconds=self._busy.seconds,
            transfers=self._transfers,
            in_flight=self._handoffs,
            failures=dict(self._failures),
            bandwidth_gb_s=self._bandwidth_gb_s,
            exposed_s=self._exposed_s,
            block_wait_s=self._block_wait_s,
        )


class Counters:
    """The counters of the peers met since the start, the least recently met first."""

    def __init__(self, backend: str, kept_peers: int = KEPT_PEERS) -> None:
        self._backend = backend
        self._kept_peers = kept_peers
        self._lock = threading.Lock()
        self._peers: OrderedDict[tuple[str, Direction], PeerCounter] = OrderedDict()
        self._others: dict[Direction, TransferCounts] = {}

    def of(self, peer: str, direction: Direction) -> PeerCounter:
        """The counter of `peer` (a worker id), made at its first use."""
        key = peer, direction
        with self._lock:
            counter = self._peers.get(key)
            if counter is None:
                counter = self._peers[key] = PeerCounter(peer, direction, self._backend, self._lock)
                self._forget_old(counter)
            else:
                self._peers.move_to_end(key)
            return counter

    def snapshot(self) -> list[TransferCounts]:
        with self._lock:
            return [*(counter.snapshot() for counter in self._peers.values()), *self._others.values()]

    def _forget_old(self, newest: PeerCounter) -> None:
        idle = [key for key, counter in self._peers.items() if counter is not newest and not counter.is_in_use]
        for key in idle[: max(0, len(idle) - self._kept_peers)]:
            gone = self._peers.pop(key).snapshot()
            known = self._others.get(gone.direction, TransferCounts(OTHERS, gone.direction, self._backend))
            self._others[gone.direction] = _added(known, gone)


def _added(known: TransferCounts, gone: TransferCounts) -> TransferCounts:
    """The counts of two peers as those of one."""
    return msgspec.structs.replace(
        known,
        bytes=known.bytes + gone.bytes,
        seconds=known.seconds + gone.seconds,
        transfers=known.transfers + gone.transfers,
        failures=dict(Counter(known.failures) + Counter(gone.failures)),
        bandwidth_gb_s=known.bandwidth_gb_s.and_also(gone.bandwidth_gb_s),
        exposed_s=known.exposed_s.and_also(gone.exposed_s),
        block_wait_s=known.block_wait_s.and_also(gone.block_wait_s),
    )


def merge(ranks: Sequence[Sequence[TransferCounts]]) -> list[TransferCounts]:
    """One worker's counters out of its ranks', of which the first leads: a handoff counts once, bytes add up, and
    the ranks' times overlap. Only the first knows what a handoff took on all ranks."""
    merged: dict[tuple[str, str], TransferCounts] = {}
    for counts in ranks:
        for each in counts:
            found = merged.get((each.peer, each.direction))
            if found is None:
                merged[each.peer, each.direction] = each
                continue
            merged[each.peer, each.direction] = msgspec.structs.replace(
                found,
                transport=found.transport or each.transport,
                bytes=found.bytes + each.bytes,
                seconds=max(found.seconds, each.seconds),
            )
    return list(merged.values())

"""What every handoff of one transceiver shares. Values only; the transceiver makes it and everybody reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.counters import Counters
from kv_transfer.layout import KvPoolView
from kv_transfer.mark_poller import MarkPoller
from kv_transfer.mover import BlockMover
from kv_transfer.peer_memory import PoolName
from pdserve.handoff import HandoffEvent

Post = Callable[[HandoffEvent], None]


@dataclass(frozen=True)
class Environment:
    """`timeout_s` bounds a handoff, `stall_timeout_s` a silent peer. `own_pool` is where receivers may read, if any."""

    pool: KvPoolView
    mover: BlockMover
    poller: MarkPoller
    post: Post
    counters: Counters
    worker_id: str
    instance: str
    timeout_s: float
    stall_timeout_s: float
    checksum: bool
    direct_reads: bool
    own_pool: PoolName | None

    @property
    def handshake_timeout_s(self) -> float:
        """Shorter than a handoff may take: a connection that hangs is given up before the handoffs that wait for it
        are, so that the next handoff finds it closed and makes a new one."""
        return min(5.0, 0.75 * self.timeout_s)

"""What every handoff of one transceiver shares. Values only; the transceiver makes it and everybody reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.counters import Counters
from kv_transfer.layout import KvPoolView
from kv_transfer.mark_poller import MarkPoller
from kv_transfer.mover import BlockMover
from kv_transfer.peer_memory import PoolName
from pdserve.errors import TransferError
from pdserve.handoff import HandoffEvent

Post = Callable[[HandoffEvent], None]


@dataclass(frozen=True)
class Environment:
    """`timeout_s` bounds a transfer (see `TransferClock`), `stall_timeout_s` a silent peer. `own_pool` is where
    receivers may read, if any. `fail` is told, in the transceiver's loop, why this worker can't go on; `hindrance`
    tells why it makes no links."""

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
    fail: Callable[[TransferError], None]
    hindrance: Callable[[], str]

    @property
    def handshake_timeout_s(self) -> float:
        """How long a connection may take to be made."""
        return 2.5 * self.stall_timeout_s

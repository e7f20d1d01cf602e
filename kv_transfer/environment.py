"""What every handoff of one transceiver uses. Values only: the transceiver makes it, its halves read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.copies import BlockCopier
from kv_transfer.counters import Counters
from kv_transfer.layout import KvPoolView
from kv_transfer.mark_poller import MarkPoller
from kv_transfer.networks.base import Network
from kv_transfer.options import TransceiverOptions
from kv_transfer.peer_memory import PoolName
from pdserve.config import CacheTransceiverConfig
from pdserve.errors import TransferError
from pdserve.handoff import HandoffEvent

Post = Callable[[HandoffEvent], None]


@dataclass(frozen=True)
class Environment:
    """See the module.

    Attributes:
        post: gets the events of handoffs, in the transceiver's loop.
        instance: the name of this life of the transceiver.
        accepts_early: whether an accept may come before its offer. So it is on followers: rank 0 accepts when it has an
            offer, and the offer to another rank may come later.
        own_pools: one a cache group: the name under which a receiver may map the pool; None: it can't be mapped.
        fail: called in the transceiver's loop with the reason why this worker can't go on.
    """

    pool: KvPoolView
    copier: BlockCopier
    poller: MarkPoller
    network: Network
    post: Post
    counters: Counters
    config: CacheTransceiverConfig
    options: TransceiverOptions
    instance: str
    accepts_early: bool
    own_pools: tuple[PoolName | None, ...]
    fail: Callable[[TransferError], None]

    @property
    def worker_id(self) -> str:
        return self.options.worker_id

    @property
    def timeout_s(self) -> float:
        """Bounds a transfer (see `TransferClock`)."""
        return self.config.kv_transfer_timeout_ms / 1000

    @property
    def stall_timeout_s(self) -> float:
        """How long a peer may be silent while something is due from it."""
        return self.options.stall_timeout_s

    @property
    def handshake_timeout_s(self) -> float:
        """How long a link may take to be made."""
        return 2.5 * self.stall_timeout_s

"""Where a rank stands among those of its worker, each in a process of its own on one host."""

from __future__ import annotations

from pathlib import Path

from kv_transfer.ranks.follower import Follower
from kv_transfer.ranks.leader import Leader
from kv_transfer.ranks.solo import Ranks, Solo
from kv_transfer.ranks.zmq_relay import ZmqRelay


def place(folder: Path, rank: int, num_ranks: int, grace_s: float = 5.0) -> Ranks:
    """`rank` of `num_ranks`, to be given to its `Transceiver`.

    Args:
        folder: for the sockets; see `ZmqRelay`. Not needed for a single rank.
        grace_s: see `Leader`.
    """
    if num_ranks == 1:
        return Solo()
    relay = ZmqRelay(folder, rank, num_ranks)
    return Follower(relay, rank) if rank else Leader(relay, num_ranks, grace_s)

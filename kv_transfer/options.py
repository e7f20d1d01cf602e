"""What a transceiver is told beside its worker's configuration. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kv_transfer.networks.base import Network
from kv_transfer.networks.by_name import make_network
from pdserve.config import CacheTransceiverConfig

STALL_TIMEOUT_S = 2.0
"""A peer that says nothing for this long while payload is under way is given up."""


@dataclass(frozen=True)
class TransceiverOptions:
    """Where a transceiver is, and how it talks.

    Args:
        worker_id: of its worker, the same for all ranks.
        host: the address to listen at; empty listens at every address of this host. If it is a loopback address,
            nothing of the transceiver is reached from elsewhere.
        dial_host: where others reach what listens at `host`; the same, if empty.
        port: 0 takes a free one.
        stall_timeout_s: how long a peer may be silent while something is due from it.
        network: makes the network for buffers on a device; tests pass their own.
    """

    worker_id: str
    host: str = ""
    dial_host: str = ""
    port: int = 0
    stall_timeout_s: float = STALL_TIMEOUT_S
    network: Callable[[CacheTransceiverConfig, torch.device], Network] = make_network

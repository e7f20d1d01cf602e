"""The networks by the name that a configuration gives them."""

from __future__ import annotations

import torch

from kv_transfer.networks.base import Network
from kv_transfer.networks.loopback import LoopbackNetwork
from kv_transfer.networks.nixl import NixlNetwork
from kv_transfer.networks.ucx import UcxNetwork
from pdserve.config import CacheTransceiverConfig


def make_network(config: CacheTransceiverConfig, device: torch.device) -> Network:
    """The network that `config.backend` names. Raises `ConfigError` when it isn't installed, or not for `device`."""
    if config.backend == "LOOPBACK":
        return LoopbackNetwork()
    return NixlNetwork(device) if config.backend == "NIXL" else UcxNetwork(device)

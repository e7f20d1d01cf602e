"""Which networks the suites of this folder run over.

NIXL brings a UCX of its own, and two UCXs in one process make it crash. So the suites run over NIXL in a process
without ucxx, which `test_nixl` starts with `PDSERVE_TEST_BACKEND=NIXL`.
"""

from __future__ import annotations

import os

import torch

from kv_transfer.networks.base import Network
from kv_transfer.networks.by_name import make_network
from pdserve.config import CacheTransceiverConfig

ALONE = os.environ.get("PDSERVE_TEST_BACKEND")
BACKENDS = [ALONE] if ALONE else ["LOOPBACK", "UCX"]
NETWORK = ALONE or "UCX"
"""Joins processes."""

SIMPLE = ALONE or "LOOPBACK"
"""Joins threads, where nothing more is needed."""


def new_network(backend: str) -> Network:
    return make_network(CacheTransceiverConfig(backend=backend), torch.device("cpu"))

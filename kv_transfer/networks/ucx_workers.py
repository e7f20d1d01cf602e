"""Makes UCX workers: which of UCX's contexts a link's worker belongs to, and with what options.

Owns the contexts (UCX's options are theirs), each made when it is first needed. A worker listens at a free port of each
network interface that its context may use.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from kv_transfer.networks.descriptors import Descriptors
from kv_transfer.networks.ucx_api import UcxApi, UcxWorker
from pdserve.errors import TransferError

HOST_OPTIONS = {"TCP_TX_SEG_SIZE": "64k", "TCP_RX_SEG_SIZE": "64k"}
"""UCX's 8 KiB segments move host memory at 1.5 GB/s over loopback, these at 4.5 GB/s."""

CUDA_OPTIONS = {"RNDV_SCHEME": "get_zcopy"}
"""The receiver reads: once it has given a payload up, no peer can still be writing to the buffer."""

LOOPBACK_OPTIONS = {"NET_DEVICES": "lo"}
"""Shared memory and the links between GPUs are no network devices, and stay."""

UNMAPPING_OPTIONS = {"CUDA_IPC_CACHE": "n"}
"""UCX keeps what it has mapped of another process until this one ends, also when that one has ended long ago."""

MAX_MAPPED_PROCESSES = 16
"""Processes whose GPU memory UCX may keep mapped. A further one's is mapped for each payload anew, which is slower."""


class Workers:
    """Makes the workers of one network, for buffers on `device`."""

    def __init__(self, api: UcxApi, device: torch.device, descriptors: Descriptors) -> None:
        self.api = api
        self._is_cuda = device.type == "cuda"
        self._descriptors = descriptors
        self._contexts: dict[tuple[bool, bool], Any] = {}
        self._mapped: set[bytes] = set()

    def make(self, only_loopback: bool, peer_process: bytes | None) -> UcxWorker:
        """A worker, for a link that is not reached from elsewhere if `only_loopback`. What comes over it is read in the
        memory of `peer_process`; None, nothing comes.

        Raises:
            TransferError: this process has no descriptors left, or UCX says no.
        """
        self._descriptors.require()
        keeps_mappings = not self._is_cuda or peer_process is None or self._may_keep(peer_process)
        try:
            context = self._context(only_loopback, keeps_mappings)
            return self.api.worker(context)
        except self.api.error as error:
            raise TransferError(f"UCX can't make a worker: {error}", "peer_lost") from None

    def _may_keep(self, peer_process: bytes) -> bool:
        if len(self._mapped) < MAX_MAPPED_PROCESSES:
            self._mapped.add(peer_process)
        return peer_process in self._mapped

    def _context(self, only_loopback: bool, keeps_mappings: bool) -> Any:
        context = self._contexts.get((only_loopback, keeps_mappings))
        if context is None:
            options = HOST_OPTIONS | (CUDA_OPTIONS if self._is_cuda else {})
            options |= LOOPBACK_OPTIONS if only_loopback else {}
            options |= {} if keeps_mappings else UNMAPPING_OPTIONS
            chosen = {key: value for key, value in options.items() if f"UCX_{key}" not in os.environ}
            context = self._contexts[only_loopback, keeps_mappings] = self.api.context(chosen)
        return context

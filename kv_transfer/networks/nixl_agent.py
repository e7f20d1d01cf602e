"""One NIXL agent: memory that a peer may write to, and writes into a peer's.

Owns the agent and its registrations; who may write where and when is `nixl`'s. Each link has an agent of its own, so
that destroying it takes back all that the peer was given. This is the only module that imports nixl.

Life cycle: made → `expose`, `meet`, `write` → `close`, after which nothing of it reads or writes memory any more. That
this holds with a peer that is frozen rests on what carries the data: over TCP, UCX in *this* process puts what comes
into memory, and over RDMA the keys that the peer holds die with the agent. Shared-memory copies (`cma`) write from
within the peer, whatever happens here, and block it meanwhile; so they are turned off.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import os
import sys
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kv_transfer.networks import ucx_tls
from pdserve.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

WHEELS = ("nixl_cu13", "nixl_cu12")
UCX_OPTIONS = "TLS=^cma,TCP_TX_SEG_SIZE=64k,TCP_RX_SEG_SIZE=64k"
"""A variable of the environment (`UCX_TLS`) wins over these. For the segments see `ucx_workers.HOST_OPTIONS`."""

LOOPBACK_OPTIONS = ",NET_DEVICES=lo"

HOST = "DRAM"
BACKEND_KEY = "cache_transceiver_config.backend"

_kept: list[Agent] = []
"""Agents that could not be destroyed: what they may still write to is never freed."""


class NixlApi:
    """The names of nixl that are used here.

    Raises:
        ConfigError: nixl is not installed, `UCX_TLS` turns on what must be off, or ucxx is in this process.
    """

    def __init__(self) -> None:
        tls = os.environ.get("UCX_TLS")
        if tls is not None and ucx_tls.allows("cma", "sm", "shm"):
            raise ConfigError(
                f"{tls!r} lets a NIXL peer write to memory that was taken back from it; exclude cma, as ^cma does",
                "UCX_TLS",
            )
        if "ucxx" in sys.modules:
            raise ConfigError("ucxx is loaded, and its UCX and NIXL's crash each other", BACKEND_KEY)
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")
        api = _import_nixl()
        self.agent = api.nixl_agent
        self.config = api.nixl_agent_config
        names = vars(api.nixlBind).values()
        own = [each for each in names if isinstance(each, type) and issubclass(each, Exception)]
        self.errors: tuple[type[Exception], ...] = (RuntimeError, *own)


@dataclass(eq=False, slots=True)
class _Region:
    """`storage` is kept alive: NIXL holds its bare address."""

    storage: torch.UntypedStorage
    descriptors: Any
    exposed: bool = False


class Agent:
    """An agent over UCX, that nobody reaches from elsewhere if `only_loopback`.

    Raises:
        TransferError: "peer_lost", as from every method but `close`: NIXL says no.
    """

    def __init__(self, api: NixlApi, only_loopback: bool = False) -> None:
        self._api = api
        self._regions: dict[int, _Region] = {}
        self._writes: dict[int, Any] = {}
        self._numbers = itertools.count(1)
        self._peer = ""
        with self._translated("an agent can't be made"):
            self._agent = api.agent(uuid.uuid4().hex, api.config(enable_prog_thread=False, backends=[]))
            options = UCX_OPTIONS + (LOOPBACK_OPTIONS if only_loopback else "")
            self._agent.create_backend("UCX", {"ucx_error_handling_mode": "peer", "engine_config": options})

    def expose(self, buffer: Tensor) -> bytes | None:
        """Let the peer write to `buffer`. What it must `meet` first; None if it knows that already."""
        with self._translated("memory can't be registered"):
            region = self._register(buffer)
            if region.exposed:
                return None
            region.exposed = True
            metadata: bytes = self._agent.get_partial_agent_metadata(region.descriptors, inc_conn_info=True)
            return metadata

    def meet(self, metadata: bytes) -> None:
        """Learn of memory that the peer has exposed, and how to reach it."""
        with self._translated("the peer's memory can't be reached"):
            self._peer = self._agent.add_remote_agent(metadata).decode("ascii", "replace")

    def write(self, buffer: Tensor, address: int) -> int:
        """Start to write uint8 `[n]` to `address` at the peer. Returns the number that `is_done` asks for.

        UCX goes on in here for as long as the peer keeps up with it: 4 MiB over loopback take 1 to 2 ms.
        """
        with self._translated("a write can't be started"):
            self._register(buffer)
            local = self._agent.get_xfer_descs([(buffer.data_ptr(), buffer.numel(), 0)], HOST)
            remote = self._agent.get_xfer_descs([(address, buffer.numel(), 0)], HOST)
            number = next(self._numbers)
            write = self._writes[number] = self._agent.initialize_xfer("WRITE", local, remote, self._peer)
            self._check(self._agent.transfer(write))
        return number

    def is_done(self, number: int) -> bool:
        """Make progress. Whether all of that write is in the peer's memory, for which NIXL flushes behind it."""
        with self._translated("a write has failed"):
            write = self._writes[number]
            if self._check(self._agent.check_xfer_state(write)) != "DONE":
                return False
            write.release()
        del self._writes[number]
        return True

    def progress(self) -> None:
        """Take in what the peer writes, where the network leaves that to us."""
        with self._translated("no progress can be made"):
            self._agent.get_new_notifs()

    def close(self) -> bool:
        """Destroy the agent, with all that is under way. False when it still lives, and may read and write."""
        agent = weakref.ref(self._agent.agent)
        try:
            while self._writes:
                number, write = next(iter(self._writes.items()))
                write.release()
                del self._writes[number], write
        except self._api.errors as error:
            log.error("NIXL does not let go of a write: %s", error)
            _kept.append(self)
            return False
        self._agent = None
        if agent() is not None:
            log.error("a NIXL agent outlives its link")
            _kept.append(self)
            return False
        self._regions.clear()
        return True

    def _register(self, buffer: Tensor) -> _Region:
        """The region that holds `buffer`: all of its storage, for a transceiver's buffers lie in one."""
        storage = buffer.untyped_storage()
        region = self._regions.get(storage.data_ptr())
        if region is None:
            whole = [(storage.data_ptr(), storage.nbytes(), 0, "")]
            region = _Region(storage, self._agent.register_memory(whole, HOST))
            self._regions[storage.data_ptr()] = region
        return region

    @staticmethod
    def _check(state: str) -> str:
        if state == "ERR":
            raise TransferError("NIXL has lost a write", "peer_lost")
        return state

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._api.errors as error:
            raise TransferError(f"{what}: {type(error).__name__} {error}", "peer_lost") from None


def _import_nixl() -> Any:
    """nixl's Python API, out of the wheel that is there."""
    raises = logging.raiseExceptions
    said = []
    for wheel in WHEELS:
        try:
            api = importlib.import_module(f"{wheel}._api")
        except ImportError as error:
            said.append(str(error))
            continue
        logging.raiseExceptions = raises  # nixl sets it, and a handler that writes to standard output
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        return api
    raise ConfigError(
        "the NIXL backend needs nixl: install pdserve[nixl] (CUDA 13, or no GPU) or pdserve[nixl-cu12] (CUDA 12); "
        f"importing it said: {'; '.join(said)}",
        BACKEND_KEY,
    )

"""Reading a peer's pool in place: naming one's own pool so that a process of the same host can map it, and mapping one.

On a GPU this is CUDA's IPC, unless `UCX_TLS` rules UCX's `cuda_ipc` out: the mapping keeps the memory alive when its
owner dies, and what is in it then stays as it is. Within one process the pool is found by its name, on any device.
Everywhere else a pool can't be mapped, and KV goes through staging.

Life of a `PeerPool`: mapped by `map_pool` → read → `close`, when nothing reads it any more.
"""

from __future__ import annotations

import ctypes
import logging
import os
import uuid
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from kv_transfer.backends import ucx_tls

log = logging.getLogger(__name__)

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1

_PROCESS = uuid.uuid4().hex
_published: WeakValueDictionary[str, Tensor] = WeakValueDictionary()


class PoolName(msgspec.Struct, frozen=True, array_like=True):
    """A pool of blocks, for others to map. `handle` is CUDA's of the allocation, in which the pool begins at `offset`;
    `host` names what shares a clock and a GPU driver, `process` and `pool` a tensor of that process."""

    host: str
    process: str
    pool: str
    device: str
    num_blocks: int
    handle: bytes = b""
    offset: int = 0


class PeerPool:
    """A pool of a peer, at `address` of this process's (device) memory. `keep` is whatever keeps it there."""

    def __init__(
        self, address: int, num_blocks: int, transport: str, keep: Tensor | None = None, base: int = 0
    ) -> None:
        self.address = address
        self.num_blocks = num_blocks
        self.transport = transport
        self._keep = keep
        self._base = base

    def close(self) -> None:
        """Unmap; nothing reads it any more."""
        if self._base:
            _warn(_driver().cuIpcCloseMemHandle(ctypes.c_uint64(self._base)), "unmapping a peer's pool")
        self._keep, self._base = None, 0


def transport_to(device: torch.device) -> str:
    """What carries KV out of a pool on `device` that a peer reads in place."""
    return "cuda_ipc" if device.type == "cuda" else "in_place"


def publish(pool: Tensor) -> PoolName | None:
    """A name under which a peer of this host may map `pool` (`[num_blocks, ...]`, contiguous), for as long as it lives;
    None if it can't be mapped."""
    name = uuid.uuid4().hex
    handle, offset = b"", 0
    if pool.is_cuda:
        found = _export(pool.data_ptr()) if _may_share() else None
        if found is None:
            return None
        handle, offset = found
    _published[name] = pool
    return PoolName(_host(), _PROCESS, name, pool.device.type, pool.shape[0], handle, offset)


def map_pool(name: PoolName, device: torch.device) -> PeerPool | None:
    """The pool that a peer calls so, readable from `device`, the calling thread's current one; None if it can't be."""
    if name.host != _host() or name.device != device.type:
        return None
    if name.process == _PROCESS:
        pool = _published.get(name.pool)
        return None if pool is None else PeerPool(pool.data_ptr(), pool.shape[0], transport_to(device), keep=pool)
    if device.type != "cuda" or len(name.handle) != HANDLE_BYTES or not _may_share():
        return None
    base = ctypes.c_uint64()
    handle = _Handle.from_buffer_copy(name.handle)
    status = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, _LAZY_ENABLE_PEER_ACCESS)
    if status:
        log.info("a peer's pool can't be mapped (CUDA error %s): KV goes through staging", status)
        return None
    return PeerPool(base.value + name.offset, name.num_blocks, transport_to(device), base=base.value)


def _may_share() -> bool:
    """Whether the user lets KV go from GPU to GPU this way."""
    return ucx_tls.allows("cuda_ipc", "cuda")


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


def _export(address: int) -> tuple[bytes, int] | None:
    """CUDA's handle of the allocation that `address` is in, and how far in."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    driver = _driver()
    status = driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    status = status or driver.cuIpcGetMemHandle(ctypes.byref(handle), base)
    if status:
        log.info("the pool can't be shared with other processes (CUDA error %s): KV goes through staging", status)
        return None
    return bytes(handle), address - base.value


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


@cache
def _host() -> str:
    """Equal for two processes only if they run under one kernel and see one clock."""
    parts = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/time"):
        try:
            parts.append(os.readlink(path) if path.endswith("time") else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return "/".join(parts) if parts[0] else _PROCESS


def _warn(status: int, what: str) -> None:
    if status:
        log.warning("%s failed: CUDA error %s", what, status)

"""Reading a peer's pool in place: naming one's own pool so that a process of the same host can map it, and mapping one.

On a GPU this is CUDA's IPC, unless `UCX_TLS` rules UCX's `cuda_ipc` out: the mapping keeps the memory alive when its
owner dies, and what is in it then stays as it is. Within one process the pool is found by its name, on any device.
Everywhere else a pool can't be mapped, and KV goes through staging.

A mapping is not believed. What a peer claims of its pool is held against the allocation itself, for a read beyond it
would take the process down; and there are hosts where a mapping succeeds and reads return something else. So the owner
writes a nonce into the margins at both ends of its pool, and says so in its `PoolName`; whoever maps the pool reads
them as it will read KV, and takes staging if they are not there (`distrust`).

Life of a `PeerPool`: mapped by `map_pool` → margins compared with `PoolName.margins` → read → `close`, when nothing
reads it any more.
"""

from __future__ import annotations

import logging
import os
import secrets
import uuid
from collections import OrderedDict
from functools import cache
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from kv_transfer import cuda_ipc
from kv_transfer.layout import KvPoolView
from kv_transfer.networks import ucx_tls
from pd_kernels.kv_pack import MARGIN_BYTES, margins
from pdserve.errors import TransferError

log = logging.getLogger(__name__)

NONCE_BYTES = 32

_PROCESS = uuid.uuid4().hex
_published: WeakValueDictionary[str, Tensor] = WeakValueDictionary()
_distrusted: OrderedDict[str, None] = OrderedDict()
_KEPT_DISTRUSTED = 256


class PoolName(msgspec.Struct, frozen=True, array_like=True):
    """The name under which another process may map a pool of blocks.

    Attributes:
        host: equal for processes that share a clock and a GPU driver.
        process, pool: name a tensor, for readers within the same process.
        device: of the pool.
        num_blocks: of the pool.
        handle, offset: CUDA's handle of an allocation, and where the pool begins in it, in bytes.
        nonce: what the margins of the pool are filled with.
    """

    host: str
    process: str
    pool: str
    device: str
    num_blocks: int
    handle: bytes = b""
    offset: int = 0
    nonce: bytes = b""

    @property
    def margins(self) -> bytes:
        """What stands in both margins, one after the other."""
        return self.nonce * (2 * MARGIN_BYTES // NONCE_BYTES)


class PeerPool:
    """A pool of a peer, of `nbytes` at `address` of this process's (device) memory. `keep` keeps it there."""

    def __init__(
        self, address: int, num_blocks: int, nbytes: int, transport: str, keep: Tensor | None = None, base: int = 0
    ) -> None:
        self.address = address
        self.num_blocks = num_blocks
        self.nbytes = nbytes
        self.transport = transport
        self._keep = keep
        self._base = base

    def close(self) -> None:
        """Unmap; nothing reads it any more."""
        if self._base:
            cuda_ipc.close_mapping(self._base)
        self._keep, self._base = None, 0


def transport_to(device: torch.device) -> str:
    """What carries KV out of a pool on `device` that a peer reads in place."""
    return "cuda_ipc" if device.type == "cuda" else "in_place"


def publish(pool: Tensor) -> PoolName | None:
    """A name under which a peer of this host may map `pool` (`[num_blocks, ...]`, contiguous), for as long as it lives;
    None if it can't be mapped, or has no margins."""
    name = uuid.uuid4().hex
    handle, offset = b"", 0
    if pool.is_cuda:
        found = cuda_ipc.export(pool.data_ptr()) if _may_share() else None
        if found is None:
            return None
        handle, offset = found
    nonce = _write_nonce(pool)
    if nonce is None:
        log.info("the pool has no margins to check a mapping by: KV goes through staging")
        return None
    _published[name] = pool
    return PoolName(_host(), _PROCESS, name, pool.device.type, pool.shape[0], handle, offset, nonce)


def publish_all(pool: KvPoolView) -> tuple[PoolName | None, ...]:
    """The names of the pools of all groups, None for one that has no layers here; nothing if one can't be mapped."""
    names = [publish(group.tensor) if group.layout.layers.size else None for group in pool.groups]
    held = [name for name, group in zip(names, pool.groups, strict=True) if group.layout.layers.size]
    return () if None in held else tuple(names)


def map_pool(name: PoolName, block_bytes: int, device: torch.device) -> PeerPool | None:
    """The pool that a peer calls so, of blocks of `block_bytes` as it says, readable from `device`, the calling
    thread's current one; None if it can't be, or was distrusted.

    Raises:
        TransferError: "protocol", the pool is not as large as the peer says.
    """
    if name.host != _host() or name.device != device.type or name.pool in _distrusted or not _has_nonce(name):
        return None
    nbytes = name.num_blocks * block_bytes
    if name.process == _PROCESS:
        pool = _published.get(name.pool)
        if pool is None:
            return None
        if pool.shape[0] != name.num_blocks or pool.numel() * pool.element_size() != nbytes:
            raise _claims_too_much(name, nbytes)
        return PeerPool(pool.data_ptr(), pool.shape[0], nbytes, transport_to(device), keep=pool)
    if device.type != "cuda" or len(name.handle) != cuda_ipc.HANDLE_BYTES or not _may_share():
        return None
    return _open(name, nbytes, transport_to(device))


def distrust(name: PoolName, owner: str) -> None:
    """The pool of `owner` was mapped, and what is read there is not what it has written: it is not mapped again."""
    log.warning(
        "reading the GPU memory of %s through its mapping returns wrong data, so that KV from there goes through "
        "staging; peer access between these GPUs does not work on this host",
        owner,
    )
    _distrusted[name.pool] = None
    if len(_distrusted) > _KEPT_DISTRUSTED:
        _distrusted.popitem(last=False)


def _has_nonce(name: PoolName) -> bool:
    return len(name.nonce) == NONCE_BYTES


def _claims_too_much(name: PoolName, nbytes: int) -> TransferError:
    what = f"{name.num_blocks} blocks, {nbytes} bytes from {name.offset} on"
    return TransferError(f"a peer says that its pool has {what}, which it has not", "protocol")


def _write_nonce(pool: Tensor) -> bytes | None:
    """Fill the margins of `pool`; None if it has none."""
    found = margins(pool)
    if found is None:
        return None
    nonce = secrets.token_bytes(NONCE_BYTES)
    for margin in found:
        margin.copy_(torch.frombuffer(bytearray(nonce * (MARGIN_BYTES // NONCE_BYTES)), dtype=torch.uint8))
    if pool.is_cuda:
        torch.cuda.current_stream(pool.device).synchronize()
    return nonce


def _open(name: PoolName, nbytes: int, transport: str) -> PeerPool | None:
    """Map another process's allocation, and look whether the pool is in there."""
    mapping = cuda_ipc.open_mapping(name.handle)
    if mapping is None:
        return None
    mapped = PeerPool(mapping.address + name.offset, name.num_blocks, nbytes, transport, base=mapping.address)
    end = name.offset + nbytes + MARGIN_BYTES
    if name.num_blocks < 1 or name.offset < MARGIN_BYTES or end > mapping.size_bytes:
        mapped.close()
        raise _claims_too_much(name, nbytes)
    return mapped


def _may_share() -> bool:
    """Whether the user lets KV go from GPU to GPU this way."""
    return ucx_tls.allows("cuda_ipc", "cuda")


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

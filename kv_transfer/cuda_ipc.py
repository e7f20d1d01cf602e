"""CUDA's inter-process memory, through `cuda-bindings`: handles of allocations of this process, mappings of others'.

This is the only module that imports `cuda.bindings`, and only where there is a GPU. Nothing here raises: where a pool
can't be mapped, the log says why, and KV goes through staging.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

HANDLE_BYTES = 64
STAGED = "KV goes through staging"


class Mapping(NamedTuple):
    """An allocation of another process, of `size_bytes`, mapped at `address`."""

    address: int
    size_bytes: int


def export(address: int) -> tuple[bytes, int] | None:
    """CUDA's handle (`HANDLE_BYTES` long) of the allocation that `address` is in, and how far in; None if there is
    none."""
    driver = _driver()
    if driver is None:
        return None
    found = _call("the pool can't be shared with other processes", driver.cuMemGetAddressRange, address)
    if found is None:
        return None
    base = int(found[0])
    handle = _call("the pool can't be shared with other processes", driver.cuIpcGetMemHandle, base)
    return None if handle is None else (ctypes.string_at(handle[0].getPtr(), HANDLE_BYTES), address - base)


def open_mapping(handle: bytes) -> Mapping | None:
    """Map the allocation that another process has exported as `handle`; None if it can't be."""
    driver = _driver()
    if driver is None:
        return None
    wanted = driver.CUipcMemHandle()
    ctypes.memmove(wanted.getPtr(), handle, HANDLE_BYTES)
    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
    opened = _call("a peer's pool can't be mapped", driver.cuIpcOpenMemHandle, wanted, flags)
    if opened is None:
        return None
    address = int(opened[0])
    measured = _call("a mapped pool's size can't be told", driver.cuMemGetAddressRange, address)
    if measured is None:
        close_mapping(address)
        return None
    return Mapping(address, int(measured[1]))


def close_mapping(address: int) -> None:
    """Unmap what `open_mapping` has mapped at `address`."""
    _call("a peer's pool can't be unmapped", _driver().cuIpcCloseMemHandle, address)


def _call(what: str, function: Any, *arguments: Any) -> tuple[Any, ...] | None:
    """What `function` returns beside its status; None after an error, with a line that says `what` it is."""
    status, *results = function(*arguments)
    if int(status):
        log.info("%s (CUDA error %d): %s", what, int(status), STAGED)
        return None
    return tuple(results)


@cache
def _driver() -> Any:
    """`cuda.bindings.driver`; None where it is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        log.warning("cuda-bindings is not installed (%s): %s, and no pool is read in place", error, STAGED)
        return None
    return driver

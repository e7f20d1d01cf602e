"""ucxx as it is used here: the one module that imports it, and that knows what it keeps private.

ucxx's own asyncio layer polls, so its low-level classes are used, which it does not promise to keep. So the version is
pinned (`UCXX_VERSION`), and compared when the UCX network is made. What ucxx does not wrap is asked of UCX itself
(`ucp_ep_query`), with the structures of `ucp/api/ucp.h`, whose layout `field_mask` and `entry_size` keep compatible.

The extra `ucx` brings ucxx, `ucx-cu12` for CUDA 12.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from pdserve.errors import ConfigError

UCXX_VERSION = "0.52"
"""Of every release whose private classes are known to be those used here."""

CLOSE_PERIOD_NS = 10**9

_KEY = "cache_transceiver_config.backend"
_FIELD_TRANSPORTS = 1 << 3
_NAME_BYTES = 32
_SOCKADDR_STORAGE_BYTES = 128
_MAX_ENTRIES = 16


class Request(Protocol):
    """A send or a receive, as ucxx and the tests' fakes have it."""

    completed: bool

    def check_error(self) -> None:
        """Raise `UcxApi.error` if it has failed."""


class UcxWorker:
    """A `UCXWorker` whose progress is ours to make; its methods are ucxx's own."""

    def __init__(self, raw: Any) -> None:
        raw.init_blocking_progress_mode()
        self.raw = raw
        self.progress: Callable[[], object] = raw.progress
        self.arm: Callable[[], bool] = raw.arm
        """Have `descriptor` tell of the next event; False if there was one already."""
        self.descriptor: int = raw.epoll_file_descriptor

    @property
    def address(self) -> bytes:
        """What a peer makes an endpoint from."""
        told: bytes = self.raw.address.tobytes()
        return told


class UcxEndpoint:
    """A `UCXEndpoint` to a peer's worker."""

    def __init__(self, raw: Any, new_tag: Callable[[int], Any]) -> None:
        self._raw = raw
        self._new_tag = new_tag

    def send(self, tag: int, memory: Any) -> Request:
        """Raises `UcxApi.error`, as `receive` does: UCX refuses."""
        sent: Request = self._raw.tag_send(memory, self._new_tag(tag))
        return sent

    def receive(self, tag: int, memory: Any) -> Request:
        received: Request = self._raw.tag_recv(memory, self._new_tag(tag))
        return received

    def transports(self) -> str:
        """Names of the transports in use, sorted and joined by commas; empty when UCX doesn't say."""
        return _transports_of(self._raw.handle)

    def close(self) -> None:
        """By force: UCX cancels its requests."""
        self._raw.close_blocking(period=CLOSE_PERIOD_NS, max_attempts=1)


class UcxApi:
    """What ucxx makes. `error` is the class of its errors.

    Raises:
        ConfigError: ucxx is not installed, is of another version, or its UCX can't be loaded.
    """

    def __init__(self) -> None:
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets variables that some builds don't know
        try:
            import ucxx
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
            from ucxx.exceptions import UCXError
        except ImportError as error:
            raise ConfigError(
                "the UCX backend needs ucxx: install pdserve[ucx] (CUDA 13, or no GPU) or pdserve[ucx-cu12] "
                f"(CUDA 12); importing it said: {error}",
                _KEY,
            ) from None
        check_version(str(ucxx.__version__))
        self._lib = libucxx
        self._new_array = Array
        self.error: type[Exception] = UCXError

    def context(self, options: dict[str, str]) -> Any:
        """A UCX context with these of UCX's options, named without their prefix."""
        return self._lib.UCXContext(options)

    def worker(self, context: Any) -> UcxWorker:
        """Raises `error`."""
        return UcxWorker(self._lib.UCXWorker(context, enable_delayed_submission=False, enable_python_future=False))

    def endpoint(self, worker: UcxWorker, address: bytes) -> UcxEndpoint:
        """To the worker that has told `address`. Raises `error`."""
        peer = self._lib.UCXAddress.create_from_buffer(address)
        raw = self._lib.UCXEndpoint.create_from_worker_address(worker.raw, peer, True)
        return UcxEndpoint(raw, self._lib.UCXXTag)

    def memory(self, buffer: Tensor) -> Any:
        """`buffer` (uint8 `[n]`) as a send or receive takes it."""
        return self._new_array(buffer if buffer.is_cuda else buffer.numpy())


def check_version(installed: str) -> None:
    """Raises `ConfigError` unless ucxx `installed` is one that is known."""
    wanted = [int(part) for part in UCXX_VERSION.split(".")]
    found = [int(part) for part in installed.split(".")[: len(wanted)] if part.isdigit()]
    if found != wanted:
        raise ConfigError(
            f"the UCX backend is made for ucxx {UCXX_VERSION}, and ucxx {installed} is installed; "
            "pdserve[ucx] and pdserve[ucx-cu12] install the right one",
            _KEY,
        )


class _Entry(ctypes.Structure):
    _fields_ = [("transport_name", ctypes.c_char_p), ("device_name", ctypes.c_char_p)]


class _Transports(ctypes.Structure):
    _fields_ = [
        ("entries", ctypes.POINTER(_Entry)),
        ("num_entries", ctypes.c_uint),
        ("entry_size", ctypes.c_size_t),
    ]


class _Attributes(ctypes.Structure):
    _fields_ = [
        ("field_mask", ctypes.c_uint64),
        ("name", ctypes.c_char * _NAME_BYTES),
        ("local_sockaddr", ctypes.c_uint64 * (_SOCKADDR_STORAGE_BYTES // 8)),
        ("remote_sockaddr", ctypes.c_uint64 * (_SOCKADDR_STORAGE_BYTES // 8)),
        ("transports", _Transports),
        ("user_data", ctypes.c_void_p),
    ]


def _transports_of(endpoint_handle: int) -> str:
    try:
        query = ctypes.CDLL("libucp.so.0").ucp_ep_query
    except (OSError, AttributeError):
        return ""
    query.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Attributes)]
    query.restype = ctypes.c_int8
    entries = (_Entry * _MAX_ENTRIES)()
    attributes = _Attributes(field_mask=_FIELD_TRANSPORTS)
    attributes.transports.entries = ctypes.cast(entries, ctypes.POINTER(_Entry))
    attributes.transports.num_entries = _MAX_ENTRIES
    attributes.transports.entry_size = ctypes.sizeof(_Entry)
    if query(endpoint_handle, ctypes.byref(attributes)) != 0:
        return ""
    found = entries[: attributes.transports.num_entries]
    return ",".join(sorted({entry.transport_name.decode() for entry in found if entry.transport_name}))

"""UCX through ucxx: control frames over TCP, payload as tagged messages, one UCX worker for each link.

A worker of its own isolates a link: its tags can't meet another's, and closing it ends all its requests and drops
whatever a peer sent too late. The workers' addresses are exchanged as the first frame of the TCP connection, so that a
transceiver has one port. Why not active messages for control: docs/adr/0002-control-channel-of-the-transceiver.md.

This is the only module that imports ucxx (the extra `ucx`, or `ucx-cu12` for CUDA 12). UCX reads its own `UCX_*`
environment; what is set there wins over what is chosen here. `UCXPY_PROGRESS_MODE` "polling" or "blocking" wins over
the choice by device: spin while GPU payload is under way, wait for events otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kv_transfer.backends.stream_transport import StreamLink, StreamTransport
from kv_transfer.backends.ucx_progress import Progress
from kv_transfer.backends.ucx_query import endpoint_transports
from pdserve.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

MAGIC = b"pdserve-kv/1 "
CLOSE_PERIOD_NS = 10**9

HOST_OPTIONS = {"TCP_TX_SEG_SIZE": "64k", "TCP_RX_SEG_SIZE": "64k"}
"""UCX's 8 KiB segments move host memory at 1.5 GB/s over loopback, these at 4.5 GB/s."""

CUDA_OPTIONS = {"RNDV_SCHEME": "get_zcopy"}
"""The receiver reads: once it has given a payload up, no peer can still be writing to the slot."""

KEPT_ARRAYS = 1024

PROGRESS_MODES = {"polling": True, "blocking": False}


class UcxTransport(StreamTransport):
    """`Transport` over UCX, for buffers on `device`.

    Raises:
        ConfigError: ucxx is not installed, or `UCXPY_PROGRESS_MODE` is not one of ours.
    """

    name = "UCX"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._spin = _spin(device)
        self._api = UcxApi()
        options = HOST_OPTIONS | (CUDA_OPTIONS if device.type == "cuda" else {})
        chosen = {key: value for key, value in options.items() if f"UCX_{key}" not in os.environ}
        self._context = self._api.context(chosen)

    def new_link(self, on_close: Callable[[StreamLink], None]) -> StreamLink:
        return UcxLink(self._api, self._context, self._spin, on_close)


class UcxLink(StreamLink):
    """`Link` over one TCP connection and one UCX worker. `joined` is done once the peer's worker is known."""

    def __init__(self, api: UcxApi, context: Any, spin: bool, on_close: Callable[[StreamLink], None]) -> None:
        self._api = api
        self._cuda_receives = False
        self._transport = ""
        self._arrays: dict[tuple[int, int], Any] = {}
        self._worker = api.worker(context, enable_delayed_submission=False, enable_python_future=False)
        self._progress = Progress(self._worker, api.error, spin)
        self._endpoint: Any = None
        super().__init__(MAGIC + self._worker.address.tobytes(), on_close)

    @property
    def transport(self) -> str:
        if not self._transport and self._endpoint is not None:
            self._transport = endpoint_transports(self._endpoint.handle)
        return self._transport

    def send_control(self, frame: bytes) -> None:
        self.stream.send(frame)

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        return self._submit("tag_send", tag, buffer, None)

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        return self._submit("tag_recv", tag, buffer, buffer.numel())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.stream.close()
        if self._endpoint is not None:
            self._endpoint.close_blocking(period=CLOSE_PERIOD_NS, max_attempts=1)
        if self._cuda_receives and self._progress.busy:
            # UCX gives a request up at once, but the copy that it had started may still run on a stream of its own.
            torch.cuda.synchronize()
        self._progress.stop()
        self._endpoint = None
        self._worker = None
        self._arrays.clear()
        self._on_close(self)

    def _receive(self, frame: bytes) -> None:
        if self._endpoint is None:
            self._join(frame)
            return
        if self._arrays:  # a link whose payload does not go this way never needs to be quick
            self._progress.wake()
        self._deliver(frame)

    def _join(self, preamble: bytes) -> None:
        try:
            if not preamble.startswith(MAGIC):
                raise TransferError("the peer is no KV transceiver of this version", "protocol")
            address = self._api.address.create_from_buffer(preamble[len(MAGIC) :])
            self._endpoint = self._api.endpoint.create_from_worker_address(self._worker, address, True)
        except TransferError as error:
            self._refuse(error)
        except self._api.error as error:
            self._refuse(TransferError(f"UCX can't reach the peer: {error}", "peer_lost"))
        else:
            if not self.joined.done():
                self.joined.set_result(None)

    def _submit(self, operation: str, tag: int, buffer: Tensor, result: int | None) -> asyncio.Future[Any]:
        """Start a tagged send or receive. One that UCX refuses, or on a closed link, is a future that has failed."""
        try:
            if self._closed or self._endpoint is None:
                raise TransferError("the link is closed", "peer_lost")
            memory = self._array(buffer)
            request = getattr(self._endpoint, operation)(memory, self._api.tag(tag))
        except TransferError as error:
            return _failed(error)
        except self._api.error as error:
            return _failed(TransferError(f"UCX refused a payload: {error}", "peer_lost"))
        self._cuda_receives |= buffer.is_cuda and result is not None
        return self._progress.track(request, result, memory)

    def _array(self, buffer: Tensor) -> Any:
        """`buffer` as UCX wants it. Slots come round and round, so what was made for them is kept."""
        place = buffer.data_ptr(), buffer.numel()
        array = self._arrays.get(place)
        if array is None:
            if len(self._arrays) >= KEPT_ARRAYS:
                self._arrays.clear()
            array = self._arrays[place] = self._api.array(buffer if buffer.is_cuda else buffer.numpy())
        return array


def _failed(error: TransferError) -> asyncio.Future[Any]:
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    future.set_exception(error)
    return future


def _spin(device: torch.device) -> bool:
    mode = os.environ.get("UCXPY_PROGRESS_MODE")
    if mode is None:
        return device.type == "cuda"
    if mode not in PROGRESS_MODES:
        raise ConfigError(f"{mode!r} is not supported; allowed: {', '.join(PROGRESS_MODES)}", "UCXPY_PROGRESS_MODE")
    return PROGRESS_MODES[mode]


class UcxApi:
    """The names of ucxx that are used here: its low-level classes, which leave progress and futures to us.

    Raises:
        ConfigError: ucxx is not installed, or its UCX can't be loaded.
    """

    def __init__(self) -> None:
        os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # ucxx sets variables that some builds don't know
        try:
            from ucxx._lib import libucxx
            from ucxx._lib.arr import Array
            from ucxx.exceptions import UCXError
        except ImportError as error:
            raise ConfigError(
                "the UCX backend needs ucxx: install pdserve[ucx] (CUDA 13, or no GPU) or pdserve[ucx-cu12] "
                f"(CUDA 12); importing it said: {error}",
                "cache_transceiver_config.backend",
            ) from None
        self.context = libucxx.UCXContext
        self.worker = libucxx.UCXWorker
        self.endpoint = libucxx.UCXEndpoint
        self.address = libucxx.UCXAddress
        self.tag = libucxx.UCXXTag
        self.array = Array
        self.error: type[Exception] = UCXError

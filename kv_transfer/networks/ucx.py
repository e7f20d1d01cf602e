"""UCX through ucxx: control frames over TCP, payload as tagged messages, one UCX worker for each link.

A worker of its own isolates a link: its tags can't meet another's, and closing it ends all its requests and drops
whatever a peer sent too late (docs/adr/0016-links-are-bounded.md). The workers' addresses are exchanged in the greeting
of the TCP connection, so that peers need one port. Why not active messages for control:
docs/adr/0002-control-channel-of-the-transceiver.md.

A worker listens itself, at a free port of each interface; of a transceiver that listens at a loopback address, at that
of the loopback interface alone, unless the peer is on another host.

`ucx_api` is the only module that imports ucxx. UCX reads its own
`UCX_*` environment; what is set there wins over what is chosen here. `UCXPY_PROGRESS_MODE` "polling" or "blocking" wins
over the choice by device: spin while GPU payload is under way, wait for events otherwise.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kv_transfer.networks.greeting import Seal
from kv_transfer.networks.stream_network import StreamLink, StreamNetwork
from kv_transfer.networks.ucx_api import UcxApi, UcxEndpoint, UcxWorker
from kv_transfer.networks.ucx_progress import Progress
from kv_transfer.networks.ucx_workers import Workers
from pdserve.errors import ConfigError, TransferError

log = logging.getLogger(__name__)

MAX_KEPT_LINKS = 4
"""Closed links whose buffers UCX has not given back. With more of them too few staging buffers would be left."""

PROCESS = uuid.uuid4().bytes
"""This process, for peers that map its memory."""

KEPT_ARRAYS = 1024

PROGRESS_MODES = {"polling": True, "blocking": False}


class UcxNetwork(StreamNetwork):
    """`Network` over UCX, for buffers on `device`.

    Raises:
        ConfigError: ucxx is not installed, or `UCXPY_PROGRESS_MODE` is not one of ours.
    """

    name = "UCX"

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._spin = _spin(device)
        self._seal = Seal(self.name)
        self._workers = Workers(UcxApi(), device, self.descriptors)
        self._kept_links = 0

    def new_link(self, on_close: Callable[[StreamLink], None]) -> StreamLink:
        return UcxLink(self._workers, self._seal, self._only_local, self._spin, self._on_kept, on_close)

    def _on_kept(self, num_requests: int) -> None:
        """UCX holds on to the buffers of a closed link."""
        self._kept_links += 1
        log.error("UCX kept %d requests of a closed endpoint; their staging buffers stay blocked", num_requests)
        if self._kept_links > MAX_KEPT_LINKS:
            self._fail(TransferError(f"UCX has kept the buffers of {self._kept_links} closed links", "aborted"))


class UcxLink(StreamLink):
    """`Link` over one TCP connection and one UCX worker, which is made when this end introduces itself."""

    def __init__(
        self,
        workers: Workers,
        seal: Seal,
        only_local: bool,
        spin: bool,
        on_kept: Callable[[int], None],
        on_close: Callable[[StreamLink], None],
    ) -> None:
        super().__init__(seal, on_close)
        self._workers = workers
        self._api = workers.api
        self._only_local = only_local
        self._spin = spin
        self._on_kept = on_kept
        self._cuda_receives = False
        self._transport = ""
        self._arrays: dict[tuple[int, int], Any] = {}
        self._progress: Progress | None = None
        self._worker: UcxWorker | None = None
        self._endpoint: UcxEndpoint | None = None

    @property
    def transport(self) -> str:
        if not self._transport and self._endpoint is not None:
            self._transport = self._endpoint.transports()
        return self._transport

    def send_control(self, frame: bytes) -> None:
        self.stream.send(frame)

    def send_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[None]:
        return self._submit(tag, buffer, None)

    def recv_payload(self, tag: int, buffer: Tensor) -> asyncio.Future[int]:
        return self._submit(tag, buffer, buffer.numel())

    def _introduce(self, introduction: bytes | None) -> bytes:
        peer_process = None if introduction is None else introduction[: len(PROCESS)]
        self._worker = self._workers.make(self._only_local and self.stream.is_local, peer_process)
        self._progress = Progress(self._worker, self._api.error, self._spin)
        return PROCESS + self._worker.address

    def _meet(self, introduction: bytes) -> None:
        assert self._worker is not None, "this end has introduced itself"
        try:
            self._endpoint = self._api.endpoint(self._worker, introduction[len(PROCESS) :])
        except self._api.error as error:
            raise TransferError(f"UCX can't reach the peer: {error}", "peer_lost") from None

    def _hear(self, frame: bytes) -> None:
        if self._arrays and self._progress is not None:  # one whose payload does not go this way need not be quick
            self._progress.wake()
        self._deliver(frame)

    def _free(self) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        if self._progress is not None:
            if self._cuda_receives and self._progress.busy:
                # UCX gives a request up at once, but the copy that it had started may still run on a stream of its own.
                torch.cuda.synchronize()
            self._progress.stop(self._on_kept)
        # The last references: with them the worker goes, and its descriptors.
        self._endpoint = self._worker = self._progress = None
        self._arrays.clear()

    def _submit(self, tag: int, buffer: Tensor, result: int | None) -> asyncio.Future[Any]:
        """Start a send, or the receive of a payload of `result` bytes. One that UCX refuses, or on a closed link, is a
        future that has failed."""
        try:
            endpoint = self._endpoint
            if endpoint is None or self._progress is None:
                raise TransferError("the link is closed", "peer_lost")
            memory = self._array(buffer)
            request = endpoint.send(tag, memory) if result is None else endpoint.receive(tag, memory)
        except TransferError as error:
            return _failed(error)
        except self._api.error as error:
            return _failed(TransferError(f"UCX refused a payload: {error}", "peer_lost"))
        self._cuda_receives |= buffer.is_cuda and result is not None
        return self._progress.track(request, result, memory)

    def _array(self, buffer: Tensor) -> Any:
        """`buffer` as UCX wants it. Buffers come round and round, so what was made for them is kept."""
        place = buffer.data_ptr(), buffer.numel()
        array = self._arrays.get(place)
        if array is None:
            if len(self._arrays) >= KEPT_ARRAYS:
                self._arrays.clear()
            array = self._arrays[place] = self._api.memory(buffer)
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

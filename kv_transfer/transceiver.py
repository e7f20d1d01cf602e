"""The KV transceiver: moves blocks between two workers' pools, in a thread of its own.

Owns the thread, its event loop, the staging buffers and the network; the pool's memory is the engine's. It knows block
ids and bytes, no model and no scheduler; `pdserve.handoff` is the contract on who owns which block when.

Life cycle: made → `start` → handoffs through `exporter` and `importer` → `close`, which ends every handoff left.
Calls return at once and take effect in the transceiver's thread, in order; events come back through `post`, in that
thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from kv_transfer import plan
from kv_transfer.backends.base import Transport
from kv_transfer.backends.loopback import LoopbackTransport
from kv_transfer.backends.ucx import UcxTransport
from kv_transfer.counters import Counters
from kv_transfer.environment import Environment
from kv_transfer.layout import KvPoolView
from kv_transfer.mover import BlockMover, Mark
from kv_transfer.outbound import Outbound
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from kv_transfer.staging import Staging
from pdserve.config import CacheTransceiverConfig
from pdserve.errors import TransferError
from pdserve.handoff import ExportFailed, HandoffEvent, ImportFailed
from pdserve.protocol import Key, KvAddress, Phase, TransferCounts

log = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 2.0
"""A peer that says nothing for this long while payload is under way is given up."""


def make_transport(config: CacheTransceiverConfig, device: torch.device) -> Transport:
    """The network that `config.backend` names. Raises `ConfigError` when it isn't installed."""
    return LoopbackTransport() if config.backend == "LOOPBACK" else UcxTransport(device)


class Transceiver:
    """Exports from and imports into `pool`.

    Args:
        pool: the engine's blocks; must outlive the transceiver.
        post: receives each event, in the transceiver's thread; must not block and not raise.
        host: the address to listen at; empty listens at every address of this host.
        port: 0 takes a free one.
        role: which staging buffers to allocate; a "context" transceiver does not listen, and its address has port 0.
        transport: makes the network; tests pass their own.
        stall_timeout_s: how long a peer may be silent while payload is under way.
    """

    def __init__(
        self,
        pool: KvPoolView,
        config: CacheTransceiverConfig,
        *,
        worker_id: str,
        post: Callable[[HandoffEvent], None],
        host: str = "",
        port: int = 0,
        role: Phase = "both",
        transport: Callable[[CacheTransceiverConfig, torch.device], Transport] = make_transport,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._pool = pool
        self._config = config
        self._worker_id = worker_id
        self._post = post
        self._host = host
        self._port = port
        self._role = role
        self._make_transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._instance = uuid.uuid4().hex
        self._counters = Counters("")
        self._mover = BlockMover(pool)
        self._loop = asyncio.new_event_loop()
        self._started: Future[KvAddress] = Future()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._staging: list[Staging] = []
        self._calls_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-transceiver", daemon=True)
        self.sender: Sender | None = None
        self.receiver: Receiver | None = None
        self.exporter = Exporter(self)
        self.importer = Importer(self)

    def start(self) -> KvAddress:
        """Listen and warm up; returns where peers find this transceiver.

        Raises:
            ConfigError: the backend is not installed.
            OSError: the address is taken, or not this host's.
        """
        self._thread.start()
        return self._started.result(START_TIMEOUT_S)

    def close(self) -> None:
        """End what is left with "aborted", close every connection, stop the thread. Returns within seconds."""
        with self._calls_lock:
            first, self._closed = not self._closed, True
            if not self._thread.is_alive():
                self._loop.close()
                return
            if first:
                self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            log.error("the KV transceiver's thread did not end within %s s", CLOSE_TIMEOUT_S)

    def counts(self) -> list[TransferCounts]:
        """What was moved to and from each peer since the start. From any thread."""
        return self._counters.snapshot()

    @property
    def staging_bytes(self) -> int:
        return sum(staging.total_bytes for staging in self._staging)

    @property
    def staging_in_use_bytes(self) -> int:
        return sum(staging.in_use_bytes for staging in self._staging)

    def mark(self) -> Mark:
        """This point of the calling thread's stream."""
        return self._mover.mark()

    def call(self, function: Callable[[], None], mark: Mark = None, otherwise: HandoffEvent | None = None) -> None:
        """Run `function` in the transceiver's thread once `mark` is reached; if it is gone, post `otherwise`."""
        with self._calls_lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._run_call, function, mark)
                return
        if otherwise is not None:
            self._post(otherwise)

    def _run_call(self, function: Callable[[], None], mark: Mark) -> None:
        if mark is None:
            function()
        else:
            self._spawn(self._run_after(mark, function))

    async def _run_after(self, mark: Mark, function: Callable[[], None]) -> None:
        await self._mover.reached(mark)
        function()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a task of the KV transceiver failed; its handoff ends by its deadline", exc_info=error)

    def _deliver(self, event: HandoffEvent) -> None:
        try:
            self._post(event)
        except Exception:
            # The engine's fault, and the handoffs beside this one must not suffer: one lost link ends many in a row.
            log.exception("%s could not be posted", event)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:
            if self._started.done():
                log.exception("the KV transceiver's thread has failed")
            else:
                self._started.set_exception(error)
        finally:
            with self._calls_lock:
                self._closed = True
            self._loop.close()

    async def _main(self) -> None:
        device = self._pool.tensor.device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        transport = self._make_transport(self._config, device)
        try:
            address = await self._open(transport)
            self._started.set_result(address)
            await self._stop.wait()
        finally:
            if self.sender is not None:
                self.sender.close()
            if self.receiver is not None:
                self.receiver.close()
            await transport.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_S / 2)

    async def _open(self, transport: Transport) -> KvAddress:
        env = self._environment(transport.name)
        port = 0
        if self._role != "context":
            self.receiver = Receiver(env, await self._new_staging())
            port = await transport.listen(self._host, self._port, self.receiver.on_link)
        if self._role != "generation":
            staging = await self._new_staging()
            self.sender = Sender(env, staging, lambda to: Outbound(env, transport, to, staging.slot_blocks))
        return KvAddress(self._worker_id, self._instance, self._host, port, self._pool.layout.hash())

    async def _new_staging(self) -> Staging:
        pool = self._pool
        cap = plan.CUDA_MESSAGE_BYTES if pool.tensor.is_cuda else plan.CPU_MESSAGE_BYTES
        size = plan.plan_staging(self._config.max_tokens_in_buffer, pool.layout.tokens_per_block, pool.block_bytes, cap)
        staging = Staging(size, pool.block_bytes, pool.tensor.device)
        self._staging.append(staging)
        if pool.tensor.is_cuda:
            await self._mover.warm_up(staging.scratch(pool.block_bytes))
        return staging

    def _environment(self, backend: str) -> Environment:
        self._counters = Counters(backend)
        return Environment(
            pool=self._pool,
            mover=self._mover,
            post=self._deliver,
            counters=self._counters,
            spawn=self._spawn,
            worker_id=self._worker_id,
            instance=self._instance,
            timeout_s=self._config.kv_transfer_timeout_ms / 1000,
            stall_timeout_s=self._stall_timeout_s,
            checksum=self._config.checksum,
        )


class Exporter:
    """`pdserve.handoff.KvExporter` over a transceiver."""

    def __init__(self, transceiver: Transceiver) -> None:
        self._transceiver = transceiver

    def offer(self, key: Key, peer: KvAddress, num_tokens: int, block_ids: Sequence[int]) -> None:
        blocks = tuple(block_ids)
        closed = ExportFailed(key, TransferError("the context worker's transceiver is closed", "aborted"))
        self._transceiver.call(lambda: self._sender.offer(key, peer, num_tokens, blocks), otherwise=closed)

    def computed(self, key: Key, num_tokens: int) -> None:
        mark = self._transceiver.mark()
        self._transceiver.call(lambda: self._sender.computed(key, num_tokens), mark)

    def finish(self, key: Key, first_token: int) -> None:
        mark = self._transceiver.mark()
        self._transceiver.call(lambda: self._sender.finish(key, first_token), mark)

    def abort(self, key: Key) -> None:
        self._transceiver.call(lambda: self._sender.abort(key))

    @property
    def _sender(self) -> Sender:
        assert self._transceiver.sender is not None, "a generation worker's transceiver exports nothing"
        return self._transceiver.sender


class Importer:
    """`pdserve.handoff.KvImporter` over a transceiver."""

    def __init__(self, transceiver: Transceiver) -> None:
        self._transceiver = transceiver

    def accept(self, key: Key, block_ids: Sequence[int], num_cached_tokens: int) -> None:
        blocks, mark = tuple(block_ids), self._transceiver.mark()
        closed = ImportFailed(key, TransferError("the generation worker's transceiver is closed", "aborted"))
        self._transceiver.call(lambda: self._receiver.accept(key, blocks, num_cached_tokens, mark), otherwise=closed)

    def abort(self, key: Key) -> None:
        self._transceiver.call(lambda: self._receiver.abort(key))

    @property
    def _receiver(self) -> Receiver:
        assert self._transceiver.receiver is not None, "a context worker's transceiver imports nothing"
        return self._transceiver.receiver

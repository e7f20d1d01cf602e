"""The KV transceiver of one rank: moves KV between two workers' pools, in a thread of its own.

Owns the thread, its event loop, the staging buffers and the network; the pool's memory is the engine's. It knows block
ids and bytes, no model and no scheduler; `pdserve.handoff` is the contract on who owns which block when. A worker of
several ranks has one in each rank's process (`ranks`); rank 0's is the one that the engine calls.

Life cycle: made → `start` → handoffs through `exporter` and `importer` → `close`, which ends every handoff left. One
that can't go on (its thread has failed, another rank of its worker is lost) says so through `on_failure`: its worker
must end, for it would fail every handoff.
Calls return at once and take effect in the transceiver's thread, in order; events come back through `post`, in that
thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import torch
import uvloop

from kv_transfer import plan
from kv_transfer.backends.base import Transport
from kv_transfer.backends.loopback import LoopbackTransport
from kv_transfer.backends.nixl import NixlTransport
from kv_transfer.backends.ucx import UcxTransport
from kv_transfer.counters import Counters, Direction
from kv_transfer.ends import Exporter, Importer
from kv_transfer.environment import Environment, Post
from kv_transfer.layout import KvPoolView
from kv_transfer.mark_poller import Mark, MarkPoller
from kv_transfer.mover import BlockMover
from kv_transfer.outbound import Outbound
from kv_transfer.peer_memory import publish
from kv_transfer.ranks.calls import Call, Ends
from kv_transfer.ranks.solo import Ranks, Solo
from kv_transfer.ranks.steps import Steps
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from kv_transfer.staging import Staging, StagingUse
from pdserve.config import CacheTransceiverConfig
from pdserve.errors import PdserveError, TransferError
from pdserve.handoff import ExportDone, HandoffEvent, ImportDone
from pdserve.protocol import KvAddress, KvRank, Phase, TransferCounts

log = logging.getLogger(__name__)

Failed = Callable[[PdserveError], None]

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0
STALL_TIMEOUT_S = 2.0
"""A peer that says nothing for this long while payload is under way is given up."""


def make_transport(config: CacheTransceiverConfig, device: torch.device) -> Transport:
    """The network that `config.backend` names. Raises `ConfigError` when it isn't installed, or not for `device`."""
    if config.backend == "LOOPBACK":
        return LoopbackTransport()
    return NixlTransport(device) if config.backend == "NIXL" else UcxTransport(device)


def _ignore_failure(_: PdserveError) -> None:
    """It is in the log."""


class Transceiver:
    """Exports from and imports into `pool`.

    Args:
        pool: the engine's blocks; must outlive the transceiver.
        post: receives each event, in the transceiver's thread; must not block and not raise.
        host: the address to listen at; empty listens at every address of this host. If it is a loopback address,
            nothing of the transceiver is reached from elsewhere.
        dial_host: where others reach what listens at `host`; the same, if empty.
        port: 0 takes a free one.
        role: which staging buffers to allocate; a "context" transceiver does not listen, and its address has port 0.
        ranks: joins this rank with its worker's others; None where there are none.
        on_failure: called at most once, in the transceiver's thread, with the reason why it can't go on.
        transport: makes the network; tests pass their own.
        stall_timeout_s: how long a peer may be silent while something is due from it.
    """

    def __init__(
        self,
        pool: KvPoolView,
        config: CacheTransceiverConfig,
        *,
        worker_id: str,
        post: Post,
        host: str = "",
        dial_host: str = "",
        port: int = 0,
        role: Phase = "both",
        ranks: Ranks | None = None,
        on_failure: Failed = _ignore_failure,
        transport: Callable[[CacheTransceiverConfig, torch.device], Transport] = make_transport,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self._pool = pool
        self._config = config
        self._worker_id = worker_id
        self._post = post
        self._host = host
        self._dial_host = dial_host or host
        self._port = port
        self._role = role
        self._ranks: Ranks = ranks or Solo()
        self._on_failure = on_failure
        self._has_failed = False
        self._transport: Transport | None = None
        self._make_transport = transport
        self._stall_timeout_s = stall_timeout_s
        self._instance = uuid.uuid4().hex
        self._counters = Counters("")
        self._mover = BlockMover(pool)
        self._loop = uvloop.new_event_loop()  # whose time() has a grain of 1 ms: measure with time.monotonic()
        self._started: Future[KvAddress] = Future()
        self._stop = asyncio.Event()
        self._staging: list[Staging] = []
        self._calls_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-transceiver", daemon=True)
        self._ends: Ends | None = None
        if self._ranks.rank > 0:
            self.steps.take_mark = self._mover.mark
        self.exporter = Exporter(self, pool.layout.layers)
        self.importer = Importer(self)

    def start(self) -> KvAddress:
        """Listen and warm up; returns where peers find this transceiver. Rank 0 waits for its followers.

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
        return self._ranks.merge(self._counters.snapshot())

    @property
    def hindrance(self) -> str:
        """Why no peer can be joined for the moment; empty when it can. From any thread."""
        return self._own_hindrance() or self._ranks.hindrance_of_others

    @property
    def staging_bytes(self) -> int:
        return self._staging_use.total_bytes

    @property
    def staging_in_use_bytes(self) -> int:
        return self._staging_use.in_use_bytes

    @property
    def _staging_use(self) -> StagingUse:
        """Of all ranks."""
        return StagingUse.of_all([*(staging.use for staging in self._staging), self._ranks.staging_of_others])

    @property
    def steps(self) -> Steps:
        """With several ranks, the engine of each calls `steps.launched()` after each step that all of them launch."""
        return self._ranks.steps

    def mark(self) -> Mark:
        """This point of the calling thread's stream."""
        return self._mover.mark()

    def call(self, call: Call, mark: Mark = None, otherwise: HandoffEvent | None = None) -> None:
        """Do as `call` says in the transceiver's thread; if it is gone, post `otherwise`."""
        with self._calls_lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(self._ranks.handle, call, mark)
                return
        if otherwise is not None:
            self._post(otherwise)

    def _deliver(self, event: HandoffEvent) -> None:
        if isinstance(event, ExportDone | ImportDone):
            direction: Direction = "sent" if isinstance(event, ExportDone) else "received"
            self._counters.of(event.cost.peer, direction).completed(event.cost)
        try:
            self._post(event)
        except Exception:
            # The engine's fault, and the handoffs beside this one must not suffer: one lost link ends many in a row.
            log.exception("%s could not be posted", event)

    def _own_hindrance(self) -> str:
        return "" if self._transport is None else self._transport.hindrance

    def _fail(self, error: PdserveError) -> None:
        if not self._has_failed:
            self._has_failed = True
            log.error("the KV transceiver can't go on: %s", error)
            self._on_failure(error)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except (Exception, asyncio.CancelledError) as error:
            if self._started.done():
                log.exception("the KV transceiver's thread has failed")
            else:
                self._started.set_exception(error)
        finally:
            with self._calls_lock:
                was_closed, self._closed = self._closed, True
            if self._started.done() and self._started.exception() is None and not was_closed:
                self._fail(TransferError("the KV transceiver's thread has ended", "aborted"))
            if not self._started.done():
                self._started.set_exception(TransferError("the transceiver was closed at its start", "aborted"))
            self._loop.close()

    async def _main(self) -> None:
        self._mover.bind()
        transport = self._transport = self._make_transport(self._config, self._pool.tensor.device)
        transport.open(self._host, self._fail)
        opening = self._loop.create_task(self._open(transport))
        stopped = self._loop.create_task(self._stop.wait())
        try:
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                self._started.set_result(opening.result())
                await stopped
        finally:
            opening.cancel()
            stopped.cancel()
            if self._ends is not None:
                self._ends.close()
                await self._ends.settle()
            await self._ranks.close()
            await transport.close()

    async def _open(self, transport: Transport) -> KvAddress:
        env = self._environment(transport.name)
        port, sender, receiver = 0, None, None
        if self._role != "context":
            receiver = Receiver(env, self._new_staging(unpacks=True), self._ranks.accepts_early)
            port = await transport.listen(self._host, self._port, self._instance, receiver.on_link)
        if self._role != "generation":
            staging = self._new_staging(unpacks=False)
            sender = Sender(env, staging, lambda to: Outbound(env, transport, to, staging.slot_bytes))
        self._ends = Ends(env.poller, sender, receiver)
        layout = self._pool.layout
        own = KvRank(self._instance, self._dial_host, port, msgspec.json.encode(layout).decode())
        ranks = await self._ranks.join(self._ends, env, self._deliver, own)
        return KvAddress(self._worker_id, self._instance, self._dial_host, port, layout.hash(), ranks)

    def _new_staging(self, unpacks: bool) -> Staging:
        pool = self._pool
        cap = plan.CUDA_MESSAGE_BYTES if pool.tensor.is_cuda else plan.CPU_MESSAGE_BYTES
        size = plan.plan_staging(self._config.max_tokens_in_buffer, pool.layout.tokens_per_block, pool.block_bytes, cap)
        staging = Staging(size, pool.block_bytes, pool.tensor.device, self._loop.call_soon)
        self._staging.append(staging)
        if pool.tensor.is_cuda:
            self._mover.warm_up(staging.scratch(pool.block_bytes), unpacks)
        return staging

    def _environment(self, backend: str) -> Environment:
        self._counters = Counters(backend)
        exports = self._role != "generation"
        return Environment(
            pool=self._pool,
            mover=self._mover,
            poller=MarkPoller(self._loop, spins=self._pool.tensor.is_cuda),
            post=self._ranks.on_event,
            counters=self._counters,
            worker_id=self._worker_id,
            instance=self._instance,
            timeout_s=self._config.kv_transfer_timeout_ms / 1000,
            stall_timeout_s=self._stall_timeout_s,
            checksum=self._config.checksum,
            direct_reads=self._config.direct_reads,
            own_pool=publish(self._pool.tensor) if exports and self._config.direct_reads else None,
            fail=self._fail,
            hindrance=self._own_hindrance,
        )

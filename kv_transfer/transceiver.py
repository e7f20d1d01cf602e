"""The KV transceiver of one rank: moves KV between two workers' pools, in a thread of its own.

`pdserve.roles.kv_transfer` makes it; the engine calls it through the role's `Exporter` and `Importer`. Owns the thread,
its event loop and the network. The pool's memory is the engine's; the handoffs are the two halves', which the roles
bring. It knows block ids and bytes, but no model and no scheduler. `pdserve.handoff` says who owns which block when. A
worker of several ranks has a transceiver in each rank's process (`ranks`); the engine calls rank 0's.

Life cycle: made → `start` → handoffs, asked for by `call` → `close`, which ends every open handoff. A transceiver that
can't go on, because its thread has failed or another rank of its worker is lost, calls `on_failure`: its worker must
end, since every handoff would fail. Calls return at once and take effect in the transceiver's thread, in order. Events
come back through `post`, in that thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future

import msgspec
import uvloop

from kv_transfer import staging
from kv_transfer.copies import BlockCopier
from kv_transfer.counters import Counters, Direction
from kv_transfer.environment import Environment, Post
from kv_transfer.halves import Half, Halves
from kv_transfer.layout import KvLayout, KvPoolView
from kv_transfer.mark_poller import Mark, MarkPoller
from kv_transfer.networks.base import Network
from kv_transfer.options import TransceiverOptions
from kv_transfer.peer_memory import publish_all
from kv_transfer.ranks.calls import Call
from kv_transfer.ranks.solo import Ranks, Solo
from kv_transfer.ranks.steps import Steps
from kv_transfer.staging import Staging, StagingUse
from pdserve.config import CacheTransceiverConfig
from pdserve.errors import PdserveError, TransferError
from pdserve.handoff import ExportDone, HandoffEvent, ImportDone
from pdserve.protocol import KvAddress, KvRank, TransferCounts

log = logging.getLogger(__name__)

Failed = Callable[[PdserveError], None]

START_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 5.0


def _ignore_failure(_: PdserveError) -> None:
    """It is in the log."""


class Transceiver:
    """Moves KV out of `pool`, into it, or both.

    Args:
        pool: the engine's blocks; must outlive the transceiver.
        post: receives each event, in the transceiver's thread; must not block and not raise.
        exports: the half that sends; None for a worker that only receives.
        imports: the half that receives, and listens for senders. None for a worker that only sends; its address then
            has port 0.
        ranks: what this rank and the worker's others tell each other; None for a worker of one rank.
        on_failure: called at most once, in the transceiver's thread, with the reason why it can't go on.
    """

    def __init__(
        self,
        pool: KvPoolView,
        config: CacheTransceiverConfig,
        options: TransceiverOptions,
        post: Post,
        *,
        exports: Half | None = None,
        imports: Half | None = None,
        ranks: Ranks | None = None,
        on_failure: Failed = _ignore_failure,
    ) -> None:
        self._pool = pool
        self._config = config
        self._options = options
        self._post = post
        self._halves = Halves(exports, imports)
        self._ranks: Ranks = ranks or Solo()
        self._on_failure = on_failure
        self._has_failed = False
        self._network: Network | None = None
        self._instance = uuid.uuid4().hex
        self._counters = Counters("")
        self._copier = BlockCopier(pool)
        self._loop = uvloop.new_event_loop()  # whose time() has a grain of 1 ms: measure with time.monotonic()
        self._poller = MarkPoller(self._loop, spins=pool.is_cuda)
        self._started: Future[KvAddress] = Future()
        self._stop = asyncio.Event()
        self._calls_lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kv-transceiver", daemon=True)
        if self._ranks.rank > 0:
            self.steps.take_mark = self._copier.mark

    def start(self) -> KvAddress:
        """Listen and warm up. Returns the address at which peers reach this transceiver. Rank 0 waits for all ranks.

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
        """What the worker has moved to and from each peer since the start. From any thread."""
        return self._ranks.merge(self._counters.snapshot())

    @property
    def hindrance(self) -> str:
        """Why no link to a further peer can be made for the moment; empty if one can. From any thread."""
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
        return StagingUse.of_all([self._halves.staging_use, self._ranks.staging_of_others])

    @property
    def layout(self) -> KvLayout:
        """The pool's."""
        return self._pool.layout

    @property
    def steps(self) -> Steps:
        """Counts the steps that this rank has launched: its engine calls `steps.launched()` after each of them."""
        return self._ranks.steps

    def mark(self) -> Mark:
        """A mark at this point of the calling thread's stream."""
        return self._copier.mark()

    def call(self, call: Call, mark: Mark = None, otherwise: HandoffEvent | None = None) -> None:
        """Carry `call` out in the transceiver's thread. What depends on the engine's computing waits for `mark`. If the
        transceiver is closed, post `otherwise` instead."""
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
        return "" if self._network is None else self._network.hindrance

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
        self._copier.bind()
        network = self._network = self._options.network(self._config, self._pool.device)
        network.open(self._options.host, self._fail)
        opening = self._loop.create_task(self._open(network))
        stopped = self._loop.create_task(self._stop.wait())
        try:
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                self._started.set_result(opening.result())
                await stopped
        finally:
            opening.cancel()
            stopped.cancel()
            await self._halves.close()
            await self._ranks.close()
            await network.close()

    async def _open(self, network: Network) -> KvAddress:
        env = self._environment(network)
        port = await self._halves.open(env, self._new_staging)
        options, layout = self._options, self._pool.layout
        host = options.dial_host or options.host
        own = KvRank(self._instance, host, port, msgspec.json.encode(layout).decode())
        ranks = await self._ranks.join(self._halves, env, self._deliver, own)
        return KvAddress(options.worker_id, self._instance, host, port, layout.hash(), ranks)

    def _new_staging(self, unpacks: bool) -> Staging:
        pool = self._pool
        size, block_bytes = staging.size_for(pool, self._config.max_tokens_in_buffer), staging.largest_block(pool)
        made = Staging(size, block_bytes, pool.device, self._loop.call_soon)
        if pool.is_cuda:
            self._copier.warm_up(made.scratch(block_bytes), unpacks)
        return made

    def _environment(self, network: Network) -> Environment:
        self._counters = Counters(network.name)
        readable = self._halves.can_export and self._config.direct_reads
        return Environment(
            pool=self._pool,
            copier=self._copier,
            poller=self._poller,
            network=network,
            post=self._ranks.on_event,
            counters=self._counters,
            config=self._config,
            options=self._options,
            instance=self._instance,
            accepts_early=self._ranks.accepts_early,
            own_pools=publish_all(self._pool) if readable else (),
            fail=self._fail,
        )

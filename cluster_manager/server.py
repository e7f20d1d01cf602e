"""The cluster manager's process.

Life cycle: the port is bound first, so a taken one fails at once; then the manager serves, whether or not its store
answers, until it is cancelled or told to stop (SIGTERM, SIGINT, SIGHUP). Watch streams are ended before the port is
closed, so stopping takes no longer than the requests in flight. It runs no workers and keeps none from running.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from types import TracebackType

from cluster_manager.app import ManagerApp
from cluster_manager.compaction import Compactor
from cluster_manager.metrics import MeteredStore, Metrics
from cluster_manager.observer import Observer
from cluster_manager.registry import Registry
from cluster_manager.store import Store, open_store
from pdserve.addresses import host_port
from pdserve.cluster_api import BOOKMARK_INTERVAL_S
from pdserve.config import ClusterConfig, DisaggCluster
from pdserve.draining import Stop
from pdserve.http import bind, start

log = logging.getLogger(__name__)


class Manager:
    """A manager on a bound socket: serves between `__aenter__` and `__aexit__`, and closes `store` at the end."""

    def __init__(
        self,
        cluster: DisaggCluster,
        store: Store,
        listener: socket.socket,
        bookmark_interval_s: float = BOOKMARK_INTERVAL_S,
    ) -> None:
        self._store = store
        self._listener = listener
        metrics = Metrics()
        metered = MeteredStore(store, metrics)
        registry = Registry(metered, cluster.cluster_name, cluster.inactive_timeout_sec)
        self._compactor = Compactor(metered, cluster.cluster_name)
        self._observer = Observer(registry, metrics)
        self.app = ManagerApp(registry, self._observer, metrics, cluster, bookmark_interval_s).build()

    async def __aenter__(self) -> Manager:
        self._runner = await start(self.app, self._listener)
        self._tasks = [
            asyncio.create_task(self._observer.run(), name="cluster-observer"),
            asyncio.create_task(self._compactor.run(), name="history-compactor"),
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._store.close()


async def run(config: ClusterConfig) -> None:
    """Serve `config`'s cluster until cancelled or told to stop.

    Raises:
        ConfigError: the store that `cluster_uri` names can't be used.
        ListenError: the port is taken.
    """
    cluster, address = config.disagg_cluster, config.manager
    store = open_store(cluster.cluster_uri)
    listener = bind(address.hostname, address.port)
    async with Manager(cluster, store, listener):
        log.info("cluster %s is managed at %s", cluster.cluster_name, host_port(*listener.getsockname()[:2]))
        stop = Stop()
        with stop.on_signals():
            await stop.asked.wait()
    log.info("stopped")

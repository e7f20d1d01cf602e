"""A worker's membership of the cluster.

Owns the registration: its lease, its incarnation, and the heartbeats that keep it. Life cycle: `run` registers, then
sends heartbeats until `leave`; when the manager no longer knows the lease it registers again with a new incarnation.
An outage of the manager or its store is waited out, however long: serving never depends on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Callable
from typing import NamedTuple

from pdserve.cluster_api import WorkerInfo, WorkerLoad
from pdserve.cluster_client import ClusterClient, backoff
from pdserve.errors import ModelMismatch, PdserveError, UnknownLease

log = logging.getLogger(__name__)

LEAVE_TIMEOUT_S = 3.0
MISMATCH_PAUSE_S = 15.0


class _Registration(NamedTuple):
    info: WorkerInfo
    lease_id: str
    heartbeat_interval_s: float


class Membership:
    """Keeps one worker registered.

    Args:
        make_info: what to register, for a new incarnation.
        load: the current load; told with every heartbeat. None: the worker can't serve, and sends none.
        on_drain: called once when the manager asks the worker to drain.
    """

    def __init__(
        self,
        client: ClusterClient,
        make_info: Callable[[str], WorkerInfo],
        load: Callable[[], WorkerLoad | None],
        on_drain: Callable[[], None],
    ) -> None:
        self._client = client
        self._make_info = make_info
        self._load = load
        self._on_drain = on_drain
        self._registration: _Registration | None = None
        self._draining = False
        self._sequence = 0
        self._leaving = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def registered(self) -> bool:
        """Whether the manager knows this worker, as far as the worker knows."""
        return self._registration is not None

    async def run(self) -> None:
        """Stay registered until `leave` or cancellation."""
        self._idle.clear()
        try:
            while not self._leaving.is_set():
                registration = await self._register()
                if registration:
                    self._registration = registration
                    await self._keep(registration)
        finally:
            self._idle.set()

    async def leave(self) -> None:
        """End `run` and deregister; gives up after `LEAVE_TIMEOUT_S`, when the lease has to lapse. Raises nothing."""
        self._leaving.set()
        try:
            async with asyncio.timeout(LEAVE_TIMEOUT_S):
                await self._idle.wait()
                registration, self._registration = self._registration, None
                if registration:
                    await self._client.deregister(registration.info.worker_id, registration.lease_id)
        except (PdserveError, TimeoutError) as error:
            log.warning("leaving without a goodbye: %s", error or "the manager did not answer")

    async def _register(self) -> _Registration | None:
        """Register, trying until it works; None when told to leave."""
        delays, refused = backoff(), False
        while not self._leaving.is_set():
            self._sequence += 1
            info = self._make_info(uuid.uuid4().hex).model_copy(update={"sequence": self._sequence})
            try:
                reply = await self._client.register(info)
            except ModelMismatch as error:
                # The cluster may be on its way to this worker's model: wait until the others are gone.
                level = logging.DEBUG if refused else logging.ERROR
                log.log(level, "not registered, trying again every %.0f s: %s", MISMATCH_PAUSE_S, error)
                refused = True
                await self._pause(MISMATCH_PAUSE_S * random.uniform(0.75, 1.25))  # two that came at once part ways
                continue
            except PdserveError as error:
                delay_s = next(delays)
                log.warning("can't register, next attempt in %.1f s: %s", delay_s, error)
                await self._pause(delay_s)
                continue
            log.info("registered as %s, incarnation %s", info.worker_id, info.incarnation)
            return _Registration(info, reply.lease_id, reply.heartbeat_interval_s)
        return None

    async def _keep(self, registration: _Registration) -> None:
        """Send heartbeats until the lease is lost or the worker leaves."""
        reachable = True
        while True:
            await self._pause(registration.heartbeat_interval_s)
            if self._leaving.is_set():
                return
            load = self._load()
            if load is None:
                continue
            try:
                await self._heartbeat(registration, load)
            except UnknownLease as error:
                log.warning("registering again: %s", error)
                self._registration = None
                return
            except PdserveError as error:
                log.log(logging.WARNING if reachable else logging.DEBUG, "no heartbeat: %s", error)
                reachable = False
            else:
                reachable = True

    async def _heartbeat(self, registration: _Registration, load: WorkerLoad) -> None:
        info, lease_id, _ = registration
        reply = await self._client.heartbeat(info.worker_id, lease_id, info.incarnation, load)
        if reply.state == "draining" and not self._draining:
            log.info("asked to drain")
            self._draining = True
            self._on_drain()
        elif reply.state != "draining" and self._draining:  # registered again meanwhile, which made it ready
            await self._client.drain(info.worker_id)

    async def _pause(self, delay_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await self._leaving.wait()

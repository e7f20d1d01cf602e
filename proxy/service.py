"""What all handlers share: the model, the fleet, the threads for text, and the requests that are open.

How much may be open is `admission`'s, the way from a body to a `Job` is `intake`'s. Life cycle: serves until `drain`,
which refuses new requests and returns once the open ones have ended; then `close`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator

from pdserve.config import ClusterConfig
from pdserve.draining import Stop, drain
from pdserve.errors import Draining
from proxy.admission import Admission
from proxy.fleet.fleet import Fleet
from proxy.job import Job
from proxy.metrics import Metrics
from proxy.model import ServedModel
from proxy.text_work import TextWork

log = logging.getLogger(__name__)


class Service:
    """See the module."""

    def __init__(self, config: ClusterConfig, model: ServedModel, fleet: Fleet, metrics: Metrics) -> None:
        self.config = config
        self.model = model
        self.fleet = fleet
        self.metrics = metrics
        self.text_work = TextWork()
        self.admission = Admission(config.proxy, metrics.in_flight.set)
        self._jobs: set[Job] = set()

    @property
    def draining(self) -> bool:
        return self.admission.draining

    @contextlib.asynccontextmanager
    async def running(self, job: Job) -> AsyncIterator[None]:
        """Start `job`, and abort whatever of it is still open at workers when the block is left."""
        self._jobs.add(job)
        try:
            await job.start()
            yield
        finally:
            self._jobs.discard(job)
            job.abort()

    async def drain(self, stop: Stop) -> None:
        """Refuse new requests and wait for the open ones; those that take too long for `stop` end with an error."""
        gate = self.admission
        gate.draining = True
        timeout_s = self.config.disagg_cluster.drain_timeout_sec
        if not await drain(log, stop, gate.wait_idle(), lambda: gate.open_choices, timeout_s):
            for job in list(self._jobs):
                job.fail(Draining("this proxy is shutting down"))

    def close(self) -> None:
        """No request is open any more, and none will come."""
        self.admission.draining = True
        self.text_work.close()

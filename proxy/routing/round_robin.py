"""Every worker in turn, whatever its load."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink


class RoundRobin:
    """The worker after the last one picked, by id; so nothing shifts when workers come and go."""

    def __init__(self, _: Role) -> None:
        self._last = ""

    def choose(self, workers: Sequence[WorkerLink]) -> WorkerLink:
        chosen = min(workers, key=lambda worker: (worker.worker_id <= self._last, worker.worker_id))
        self._last = chosen.worker_id
        return chosen

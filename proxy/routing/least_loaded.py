"""The worker with the least to do, in turn among equals."""

from __future__ import annotations

from collections.abc import Sequence

from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink
from proxy.routing.round_robin import RoundRobin


class LeastLoaded:
    """Prompt tokens in line decide how long a prefill waits, the number of sequences how long a decode step takes."""

    def __init__(self, role: Role) -> None:
        self._role: Role = role
        self._turn = RoundRobin(role)

    def choose(self, workers: Sequence[WorkerLink]) -> WorkerLink:
        loads = [self._measure(worker) for worker in workers]
        least = min(loads)
        return self._turn.choose([worker for worker, load in zip(workers, loads, strict=True) if load == least])

    def _measure(self, worker: WorkerLink) -> int:
        return worker.load.pending_prefill_tokens if self._role == "context" else worker.load.open_requests

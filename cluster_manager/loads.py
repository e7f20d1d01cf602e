"""What the workers' last heartbeats to this manager told of their load.

Kept in memory alone: several workers that change their load twice a second would fill a store that keeps every change.
Of a worker whose heartbeats go to another manager, nothing is known here.
"""

from __future__ import annotations

import time

from pdserve.cluster_api import WorkerLoad


class Loads:
    """Loads by worker and lease; forgotten when no heartbeat has told any for `keep_s`."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._told: dict[tuple[str, str], tuple[float, WorkerLoad]] = {}  # the longest ago told first

    def __len__(self) -> int:
        return len(self._told)

    def tell(self, worker_id: str, lease_id: str, load: WorkerLoad) -> None:
        """Take note of what a heartbeat says."""
        now_s = time.monotonic()
        self._told.pop((worker_id, lease_id), None)
        self._told[worker_id, lease_id] = now_s, load
        while now_s - next(iter(self._told.values()))[0] > self._keep_s:
            del self._told[next(iter(self._told))]

    def get(self, worker_id: str, lease_id: str) -> WorkerLoad | None:
        """The load that was told last; None if that is too long ago, or never was here."""
        told_s, load = self._told.get((worker_id, lease_id), (0.0, None))
        return load if load is not None and time.monotonic() - told_s <= self._keep_s else None

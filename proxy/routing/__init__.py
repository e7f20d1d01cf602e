"""Which of several workers takes a request: a file for each policy, and this registry of them.

A policy is added as `proxy/routing/NAME.py`, a line in `POLICIES`, and its name among the values that the configuration
allows for `proxy.placement`. It looks at what each worker has to do (`WorkerLink.load`) and keeps no list of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from pdserve.protocol import Role
from proxy.fleet.link import WorkerLink
from proxy.routing.least_loaded import LeastLoaded
from proxy.routing.round_robin import RoundRobin


class Policy(Protocol):
    """Picks workers of one role, for one request after the other."""

    def choose(self, workers: Sequence[WorkerLink]) -> WorkerLink:
        """One of `workers`, of which there is at least one."""


POLICIES: dict[str, Callable[[Role], Policy]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
}
"""By name; each makes a policy for the workers of one role."""


def pick(policy: Policy, workers: Sequence[WorkerLink], avoid: Collection[str] = ()) -> WorkerLink | None:
    """The worker to use, None if there is none. Those in `avoid` are left out, unless there are no others."""
    pool = [worker for worker in workers if worker.worker_id not in avoid] or workers
    return policy.choose(pool) if pool else None

"""What a routing policy is: it picks one of some workers of a role. It keeps no list of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from proxy.fleet.load import Load


class Candidate(Protocol):
    """What a policy may look at."""

    @property
    def worker_id(self) -> str: ...
    @property
    def load(self) -> Load: ...


C = TypeVar("C", bound=Candidate)


class Policy(Protocol):
    """Picks workers of one role, for one request after the other."""

    def choose(self, workers: Sequence[C]) -> C:
        """One of `workers`, which are at least one."""


def pick(policy: Policy, workers: Sequence[C], avoid: Collection[str] = ()) -> C | None:
    """The worker to use, None if there is none. Those in `avoid` are left out, unless there are no others."""
    pool = [worker for worker in workers if worker.worker_id not in avoid] or workers
    return policy.choose(pool) if pool else None

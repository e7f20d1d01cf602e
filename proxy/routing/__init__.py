"""Which of several workers takes a request: a file for each policy, and this registry of them.

A policy is added as `proxy/routing/NAME.py`, a line here, and its name among the values that the configuration allows
for `proxy.placement`.
"""

from __future__ import annotations

from collections.abc import Callable

from pdserve.protocol import Role
from proxy.routing.least_loaded import LeastLoaded
from proxy.routing.policy import Policy
from proxy.routing.round_robin import RoundRobin

POLICIES: dict[str, Callable[[Role], Policy]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
}
"""By name; each makes a policy for the workers of one role."""

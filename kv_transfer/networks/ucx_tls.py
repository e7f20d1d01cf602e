"""Which transports the user leaves UCX: the environment's `UCX_TLS`, for what is done beside UCX."""

from __future__ import annotations

import os


def allows(*names: str) -> bool:
    """Whether `UCX_TLS` leaves a transport that goes by one of `names`, its own or of a group that it is in. It lists
    what may be used, or after "^" what may not; unset, it leaves all."""
    listed = os.environ.get("UCX_TLS", "all")
    named = {name.strip().removeprefix("\\") for name in listed.removeprefix("^").split(",")}
    return named.isdisjoint({"all", *names}) is listed.startswith("^")

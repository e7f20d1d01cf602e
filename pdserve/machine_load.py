"""Whether this host has time for a measurement."""

from __future__ import annotations

import os

# A benchmark keeps several processes busy; beside this much other work its figures are another machine's.
_BUSY_SHARE = 0.5


def busy_warning() -> str | None:
    """A line for people if others keep this host busy now, as the mean of the last minute tells; None if not."""
    try:
        load = os.getloadavg()[0]
    except OSError:
        return None
    cores = os.cpu_count() or 1
    if load <= _BUSY_SHARE * cores:
        return None
    return (
        f"this host is busy: load average {load:.1f} on {cores} cores in the last minute; "
        "figures will be lower than those of an idle host, and vary"
    )

"""What a benchmark says beside its figures: to whoever waits for them, on standard error."""

from __future__ import annotations

import sys

from pdserve.machine_load import busy_warning


def say(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def warn_if_busy() -> None:
    """Say that this host is busy, if it is; to be called before anything is started."""
    if (warning := busy_warning()) is not None:
        say(f"warning: {warning}")

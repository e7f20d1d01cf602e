"""The followers' processes below this one, told apart from those of other tests' servers."""

from __future__ import annotations

import contextlib

import psutil


def followers() -> list[psutil.Process]:
    """Ranks that this process, or one that it started, has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie: gone, and not waited for yet
            if any("ranks.rank_process" in part for part in process.cmdline()):
                found.append(process)
    return found

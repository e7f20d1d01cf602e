"""Which GPUs this host has, told without a CUDA context, and which worker gets which."""

from __future__ import annotations

import os
import re
from pathlib import Path


def visible_gpus() -> list[str]:
    """Device ids in `CUDA_VISIBLE_DEVICES` form; that variable, if set, limits them."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limited is not None:
        return [part.strip() for part in limited.split(",") if part.strip() and part.strip() != "-1"]
    numbers = [re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*")]
    return [str(index) for index, _ in enumerate(match for match in numbers if match)]


def gpu_environment(gpus: list[str], first: int) -> dict[str, str]:
    """Environment that makes `gpus[first]` (round robin) the process's device 0, and those after it the next ones.

    The other GPUs stay visible behind its own: CUDA can map a peer's memory into a process (cuda_ipc) only if the
    peer's GPU is visible there.
    """
    if not gpus:
        return {}
    first %= len(gpus)
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first:] + gpus[:first])}

"""How fast this host copies memory by itself: what a KV transfer between two of its workers is held against."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from pdserve.addresses import is_this_machine
from pdserve.cluster_api import WorkerInfo


@dataclass(frozen=True, slots=True)
class PlainCopy:
    """`what` names the copy, or says why there is none; `gb_per_s` measures one of so many bytes, None if it can't."""

    what: str
    gb_per_s: Callable[[int, int], float | None] = lambda nbytes, repeats: None


def between(source: WorkerInfo, target: WorkerInfo) -> PlainCopy:
    """The plain copy for these two workers, made by this process.

    Between the first two GPUs that it sees, which are taken to be joined like any two of them, or within host memory.
    """
    import torch

    if not (_is_here(source) and _is_here(target)):
        return PlainCopy("not measurable here: the workers are on other hosts")
    if source.device == target.device == "cpu":
        return PlainCopy("memcpy", lambda nbytes, repeats: _measure("cpu", "cpu", nbytes, repeats))
    if "cpu" in (source.device, target.device):
        return PlainCopy("not measurable here: one worker has a GPU, the other none")
    if torch.cuda.device_count() < 2:
        return PlainCopy(f"not measurable here: this process sees {torch.cuda.device_count()} GPUs")
    return PlainCopy(
        "peer copy, cuda:0 to cuda:1", lambda nbytes, repeats: _measure("cuda:0", "cuda:1", nbytes, repeats)
    )


def _is_here(worker: WorkerInfo) -> bool:
    return is_this_machine(urlsplit(worker.url).hostname or "")


def _measure(source: str, target: str, nbytes: int, repeats: int) -> float | None:
    """Median of `repeats` copies after one that does not count; None if there is no memory for it."""
    import torch

    def synchronize() -> None:
        for device in {source, target} - {"cpu"}:
            torch.cuda.synchronize(device)

    try:
        origin = torch.ones(nbytes, dtype=torch.uint8, device=source)
        copy = torch.empty(nbytes, dtype=torch.uint8, device=target)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    seconds = []
    for _ in range(1 + repeats):
        synchronize()
        started_s = time.perf_counter()
        copy.copy_(origin)
        synchronize()
        seconds.append(time.perf_counter() - started_s)
    return nbytes / statistics.median(seconds[1:]) / 1e9

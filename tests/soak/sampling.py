"""What the processes that stay take, over time, and whether it grows."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

MIB = 1 << 20
PERIOD_S = 2.0


@dataclass
class Series:
    """One process: resident memory in bytes, open descriptors and threads, at the same moments."""

    name: str
    process: psutil.Process
    resident: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def sample(self) -> None:
        with self.process.oneshot():
            self.resident.append(self.process.memory_info().rss)
            self.descriptors.append(self.process.num_fds())
            self.threads.append(self.process.num_threads())


def growth(values: Sequence[int]) -> float:
    """By what share the last tenth of `values` lies over the tenth after the middle, medians both."""
    middle, tenth = len(values) // 2, max(1, len(values) // 10)
    early = statistics.median(values[middle : middle + tenth])
    return statistics.median(values[-tenth:]) / early - 1.0


@dataclass
class Watch:
    """Samples all `series` until cancelled."""

    series: list[Series]
    began_s: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        while True:
            for each in self.series:
                each.sample()
            await asyncio.sleep(PERIOD_S)

    def table(self) -> str:
        lines = [f"{'process':<22}{'first':>9}{'middle':>8}{'last MiB':>9}{'2nd half':>10}  descriptors, threads"]
        for each in self.series:
            middle = len(each.resident) // 2
            memory = [each.resident[at] / MIB for at in (0, middle, -1)]
            lines.append(
                f"{each.name:<22}{memory[0]:>9.1f}{memory[1]:>8.1f}{memory[2]:>9.1f}{growth(each.resident):>+10.1%}"
                f"  {each.descriptors[middle]} → {each.descriptors[-1]}, {each.threads[middle]} → {each.threads[-1]}"
            )
        return "\n".join(lines)


def etcd_bytes(endpoint: str) -> int:
    """The size of etcd's database file."""
    request = urllib.request.Request(f"http://{endpoint}/v3/maintenance/status", b"{}")
    with urllib.request.urlopen(request, timeout=10) as response:
        return int(json.load(response)["dbSize"])

"""Device time of work inside CUDA graphs, and tables of results."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`work` as a graph; it runs once before, because what compiles or allocates must not be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def replay_us(graph: torch.cuda.CUDAGraph, repeats: int = 9) -> float:
    """Median microseconds of a replay."""
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) * 1e3 for start, stop in events)


def table(title: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, printed as they come."""
    print(f"\n{title}", flush=True)
    kept = []
    for row in rows:
        if not kept:
            print("  ".join(f"{name:>12}" for name in row))
        print("  ".join(f"{value!s:>12}" for value in row.values()), flush=True)
        kept.append(row)
    return kept

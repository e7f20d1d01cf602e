"""A worker's Prometheus metrics, read from the engine's latest `EngineStats` at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.distribution import BANDWIDTH_BOUNDS_GB_S, WAIT_BOUNDS_S, Distribution
from pdserve.protocol import EngineStats, TransferCounts

_PEER_LABELS = ("peer", "direction", "backend", "transport")
_PEER_HISTOGRAMS = {
    "transfer_bandwidth_gb_per_second": (
        "bandwidth_gb_s",
        BANDWIDTH_BOUNDS_GB_S,
        "GB (10^9 bytes) a second of each completed handoff, while its payload was under way",
    ),
    "transfer_exposed_seconds": (
        "exposed_s",
        WAIT_BOUNDS_S,
        "Of each completed handoff: from all KV computed and the first token sampled, until all is in place",
    ),
    "transfer_block_wait_seconds": (
        "block_wait_s",
        WAIT_BOUNDS_S,
        "The part of the exposed time in which the generation worker had no blocks for it yet",
    ),
}
_ENGINE_GAUGES = {
    "running": "Sequences in the running batch",
    "waiting": "Sequences waiting for their prefill",
    "awaiting_kv": "Sequences whose KV is still with a context worker",
}
_ENGINE_COUNTERS = {
    "steps": "Engine steps",
    "prefill_tokens": "Prompt tokens computed",
    "decode_tokens": "Tokens decoded",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "preemptions": "Sequences set back to be recomputed",
    "step_seconds": "Time spent in engine steps",
    "partially_reused_blocks": "KV blocks of which a prompt could use only the beginning",
    "offloaded_blocks": "KV blocks copied to the host when they were evicted",
    "onboarded_blocks": "KV blocks brought back from the host",
}


class WorkerCollector(Collector):
    """Prometheus families of one worker. `stats` returns the latest; `open_sockets` counts connected proxies."""

    def __init__(self, stats: Callable[[], EngineStats], open_sockets: Callable[[], int]) -> None:
        self._stats = stats
        self._open_sockets = open_sockets

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text in _ENGINE_GAUGES.items():
            yield GaugeMetricFamily(f"pdserve_engine_{name}", text, value=getattr(stats, name))
        for name, text in _ENGINE_COUNTERS.items():
            yield CounterMetricFamily(f"pdserve_engine_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily("pdserve_worker_sockets", "Proxies connected", value=self._open_sockets())
        yield from _blocks(stats)
        yield from _host_blocks(stats)
        yield GaugeMetricFamily("pdserve_kv_staging_bytes", "Size of all ranks' staging", value=stats.staging_bytes)
        yield GaugeMetricFamily(
            "pdserve_kv_staging_in_use_bytes", "Staging bytes held by transfers", value=stats.staging_in_use_bytes
        )
        yield from _transfers(stats.transfers)


def registry(stats: Callable[[], EngineStats], open_sockets: Callable[[], int]) -> CollectorRegistry:
    """A registry with the worker's families and those of its server process."""
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    made.register(WorkerCollector(stats, open_sockets))
    return made


def _blocks(stats: EngineStats) -> Iterable[Metric]:
    by_state = GaugeMetricFamily("pdserve_kv_blocks", "KV blocks by state; the states add up", labels=("state",))
    for state in ("free", "cached", "used", "reserved"):
        by_state.add_metric((state,), getattr(stats.blocks, state))
    yield by_state
    yield GaugeMetricFamily("pdserve_kv_blocks_all", "KV blocks of the pool", value=stats.blocks.total)
    yield GaugeMetricFamily(
        "pdserve_kv_blocks_available",
        "KV blocks that a request may take: free ones, and cached ones that nobody uses",
        value=stats.blocks.available,
    )


def _host_blocks(stats: EngineStats) -> Iterable[Metric]:
    yield GaugeMetricFamily("pdserve_kv_host_blocks_all", "KV blocks in host memory", value=stats.host_blocks)
    yield GaugeMetricFamily(
        "pdserve_kv_host_blocks_used", "Those of them that hold a prefix", value=stats.host_blocks_used
    )


def _transfers(transfers: list[TransferCounts]) -> Iterable[Metric]:
    moved = CounterMetricFamily("pdserve_kv_transfer_bytes", "KV bytes moved, by all ranks", labels=_PEER_LABELS)
    spent = CounterMetricFamily(
        "pdserve_kv_transfer_seconds", "Time in which payload was under way, of the slowest rank", labels=_PEER_LABELS
    )
    done = CounterMetricFamily("pdserve_kv_transfers", "Completed handoffs", labels=_PEER_LABELS)
    open_now = GaugeMetricFamily("pdserve_kv_transfers_in_flight", "Handoffs under way", labels=_PEER_LABELS)
    failed = CounterMetricFamily("pdserve_kv_transfer_failures", "Failed handoffs", labels=(*_PEER_LABELS, "reason"))
    histograms = [
        (HistogramMetricFamily(f"pdserve_kv_{name}", text, labels=_PEER_LABELS), field, bounds)
        for name, (field, bounds, text) in _PEER_HISTOGRAMS.items()
    ]
    for counts in transfers:
        labels = (counts.peer, counts.direction, counts.backend, counts.transport)
        moved.add_metric(labels, counts.bytes)
        spent.add_metric(labels, counts.seconds)
        done.add_metric(labels, counts.transfers)
        open_now.add_metric(labels, counts.in_flight)
        for reason, number in counts.failures.items():
            failed.add_metric((*labels, reason), number)
        for family, field, bounds in histograms:
            distribution: Distribution = getattr(counts, field)
            family.add_metric(labels, distribution.cumulative(bounds), distribution.total)
    return (moved, spent, done, open_now, failed, *(family for family, _, _ in histograms))

"""The proxy's Prometheus metrics.

Owns one registry per proxy, so that several can live in one process. Two observations are made for each token:
prometheus_client's own histogram takes 0.56 us for one, ours 0.11 us.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from pdserve.distribution import Distribution

_LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_TOKEN_BUCKETS_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_GAP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_OVERHEAD_BUCKETS_S = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)


class Histogram(Collector):
    """A histogram without labels, for one thread. `bounds` rise; a value counts where it is at most the bound."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def collect(self) -> Iterable[Metric]:
        buckets = Distribution(tuple(self._counts)).cumulative(self._bounds)
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._total)


class Metrics:
    """Counters, gauges and histograms under the prefix `pdserve_proxy_`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered", "route", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of submitted requests")
        self.output_tokens = self._counter("output_tokens", "Tokens received from workers and used")
        self.local_prefills = self._counter(
            "local_prefills", "Attempts whose prompt went to a generation worker instead of a context worker", "reason"
        )
        self.retries = self._counter("retries", "Attempts that followed a failed one", "error")
        self.aborts = self._counter("aborts", "Choices ended before their workers did: disconnects, stop strings")
        self.in_flight = Gauge("pdserve_proxy_requests_in_flight", "Open requests", registry=self.registry)
        self._connections = Gauge(
            "pdserve_proxy_worker_connections", "Connected and ready workers", ["role"], registry=self.registry
        )
        self._other_models = Gauge(
            "pdserve_proxy_workers_of_another_model", "Workers that get no requests for it", registry=self.registry
        )
        self.ttft = self._histogram("ttft_seconds", "Arrival to first token", _LATENCY_BUCKETS_S)
        self.itl = self._histogram("itl_seconds", "Between two pieces of one choice", _TOKEN_BUCKETS_S)
        self.tpot = self._histogram("tpot_seconds", "Mean time per token after the first, by choice", _TOKEN_BUCKETS_S)
        self.e2e = self._histogram("e2e_seconds", "Arrival to last token", _LATENCY_BUCKETS_S)
        self.handoff_gap = self._histogram(
            "handoff_gap_seconds",
            "First token to the next, less the pace of the same choice: what the handoff cost the client",
            _GAP_BUCKETS_S,
        )
        self.submit_overhead = self._histogram(
            "submit_overhead_seconds", "Arrival of the request to its submission", _OVERHEAD_BUCKETS_S
        )
        self.delta_overhead = self._histogram(
            "delta_overhead_seconds", "Receipt of tokens to their write to the client", _OVERHEAD_BUCKETS_S
        )

    def watch_connections(self, role: str, count: Callable[[], float]) -> None:
        """Report `count()` as the connected workers of `role`."""
        self._connections.labels(role).set_function(count)

    def watch_other_models(self, count: Callable[[], float]) -> None:
        """Report `count()` as the workers of another model."""
        self._other_models.set_function(count)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"pdserve_proxy_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"pdserve_proxy_{name}", text, buckets)
        self.registry.register(histogram)
        return histogram

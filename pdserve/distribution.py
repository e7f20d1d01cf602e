"""Observations counted between fixed bounds: what a Prometheus histogram is made of, small enough to travel often."""

from __future__ import annotations

from bisect import bisect_left

import msgspec

BANDWIDTH_BOUNDS_GB_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 150, 200, 250, 300, 350, 400, 600, 800)
"""From a slow network to NVLink. GB are 10^9 bytes."""

WAIT_BOUNDS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Distribution(msgspec.Struct, frozen=True, array_like=True):
    """`counts[i]` values were at most `bounds[i]` and above the bound before it, the last of them above all bounds;
    empty before the first value. `total` is their sum. The bounds are known to both ends, and don't travel."""

    counts: tuple[int, ...] = ()
    total: float = 0.0

    def plus(self, value: float, bounds: tuple[float, ...]) -> Distribution:
        """With `value` counted too."""
        counts = list(self.counts) or [0] * (len(bounds) + 1)
        counts[bisect_left(bounds, value)] += 1
        return Distribution(tuple(counts), self.total + value)

    def and_also(self, other: Distribution) -> Distribution:
        """With all values of `other` counted too, which has the same bounds."""
        if not self.counts or not other.counts:
            return Distribution(self.counts or other.counts, self.total + other.total)
        counts = tuple(mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True))
        return Distribution(counts, self.total + other.total)

    def cumulative(self, bounds: tuple[float, ...]) -> list[tuple[str, float]]:
        """Prometheus' buckets: each bound with the number of values up to it."""
        buckets: list[tuple[str, float]] = []
        seen = 0
        counts = self.counts or (0,) * (len(bounds) + 1)
        for bound, count in zip((*bounds, float("inf")), counts, strict=True):
            seen += count
            buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), seen))
        return buckets

"""Histograms from the engine's process to a worker's /metrics."""

from __future__ import annotations

import msgspec

from pdserve.distribution import BANDWIDTH_BOUNDS_GB_S, WAIT_BOUNDS_S, Distribution
from pdserve.protocol import EngineStats, TransferCounts, encode, from_engine_decoder
from pdserve.worker.metrics import registry

BOUNDS = (1.0, 2.0, 4.0)


def test_a_value_counts_in_the_first_bucket_that_holds_it() -> None:
    distribution = Distribution()
    assert distribution.cumulative(BOUNDS) == [("1.0", 0), ("2.0", 0), ("4.0", 0), ("+Inf", 0)]
    for value in (0.0, 1.0, 1.5, 4.0, 4.1, 100.0):
        distribution = distribution.plus(value, BOUNDS)
    assert distribution.counts == (2, 1, 1, 2)
    assert distribution.cumulative(BOUNDS) == [("1.0", 2), ("2.0", 3), ("4.0", 4), ("+Inf", 6)]
    assert distribution.total == 110.6


def test_what_a_peer_was_sent_is_told_by_peer() -> None:
    exposed = Distribution().plus(0.003, WAIT_BOUNDS_S).plus(40.0, WAIT_BOUNDS_S)
    counts = TransferCounts(
        peer="generation-0",
        direction="sent",
        backend="UCX",
        transport="cuda_ipc",
        bytes=5,
        in_flight=2,
        failures={"timeout": 3},
        bandwidth_gb_s=Distribution().plus(270.0, BANDWIDTH_BOUNDS_GB_S),
        exposed_s=exposed,
    )
    stats = from_engine_decoder.decode(encode(EngineStats(transfers=[counts], staging_in_use_bytes=9)))
    assert isinstance(stats, EngineStats)
    collected = list(registry(lambda: stats, lambda: 0).collect())
    samples = {
        (sample.name, sample.labels.get("le"), sample.labels.get("reason")): sample.value
        for family in collected
        for sample in family.samples
        if sample.labels.get("peer") == "generation-0"
    }
    assert samples["pdserve_kv_transfer_bytes_total", None, None] == 5
    assert samples["pdserve_kv_transfers_in_flight", None, None] == 2
    assert samples["pdserve_kv_transfer_failures_total", None, "timeout"] == 3
    bandwidth = "pdserve_kv_transfer_bandwidth_gb_per_second"
    assert [samples[f"{bandwidth}_bucket", le, None] for le in ("250.0", "300.0", "+Inf")] == [0, 1, 1]
    assert samples["pdserve_kv_transfer_exposed_seconds_bucket", "0.005", None] == 1
    assert samples["pdserve_kv_transfer_exposed_seconds_bucket", "30.0", None] == 1
    assert samples["pdserve_kv_transfer_exposed_seconds_count", None, None] == 2
    assert samples["pdserve_kv_transfer_exposed_seconds_sum", None, None] == exposed.total
    assert samples["pdserve_kv_transfer_block_wait_seconds_count", None, None] == 0


def test_stats_of_an_older_engine_have_no_distributions() -> None:
    assert msgspec.convert(["generation-0", "sent", "UCX"], TransferCounts).exposed_s == Distribution()

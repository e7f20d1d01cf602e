"""The load generator's arithmetic and its plot: a figure that is computed wrongly is worse than none."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.plot import draw
from benchmarks.serve import Sample, _read_line, percentile, summarize, table

ARGUMENTS = argparse.Namespace(
    input_len=10, output_len=3, concurrency=2, rate=0.0, ttft_limit_ms=150.0, tpot_limit_ms=25.0
)


def sample(sent_s: float, *arrivals_s: float, error: str | None = None) -> Sample:
    return Sample(sent_s, [sent_s + at for at in arrivals_s], len(arrivals_s), error)


def test_latencies_throughput_and_goodput() -> None:
    samples = [
        sample(0.0, 0.1, 0.12, 0.14),  # within both limits
        sample(1.0, 0.2, 0.22, 0.24),  # first token late
        sample(2.0, 0.1, 0.15, 0.2),  # tokens slow
        sample(3.0, 0.1, error="503: gone"),
    ]
    result = summarize(samples, 2.0, ARGUMENTS)
    assert (result["requests"], result["failed"], result["errors"]) == (4, 1, ["503: gone"])
    assert result["output_tokens_per_s"] == 9 / 2
    assert result["input_tokens_per_s"] == 30 / 2
    assert (result["requests_per_s"], result["goodput_requests_per_s"]) == (1.5, 0.5)
    assert result["ttft_ms_p50"] == pytest.approx(100)
    assert result["ttft_ms_p99"] == pytest.approx(200)
    assert result["tpot_ms_p99"] == pytest.approx(50)
    assert result["itl_ms_p50"] == pytest.approx(20)


def test_percentiles_are_of_the_values_themselves() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0, 5.0], percent) for percent in (0, 50, 99, 100)] == [1, 3, 5, 5]


@pytest.mark.parametrize(
    ("line", "arrivals", "tokens", "failed"),
    [
        (b'data: {"choices":[{"index":0,"text":"a"}],"usage":null}', 1, 0, False),
        (b'data: {"choices":[{"index":0,"text":"a"}]}\r', 1, 0, False),
        (b'data: {"choices": [{"index": 0, "text": "a"}], "usage": null}', 1, 0, False),
        (rb'data: {"choices":[{"index":0,"text":"\"error\" \"usage\":{}"}],"usage":null}', 1, 0, False),
        (b'data: {"choices":[],"usage":{"completion_tokens":7}}', 0, 7, False),
        (b'data: {"choices":[{"index":0,"text":"a"}],"usage":{"completion_tokens":7}}', 1, 7, False),
        (b'data: {"error":{"message":"gone"}}', 0, 0, True),
        (b"data: [DONE]", 0, 0, False),
        (b": a comment", 0, 0, False),
        (b"", 0, 0, False),
    ],
)
def test_events_are_told_apart_with_and_without_a_parser(line: bytes, arrivals: int, tokens: int, failed: bool) -> None:
    seen = Sample(0.0)
    _read_line(seen, line, 1.5)
    assert (seen.arrivals_s, seen.output_tokens, seen.error is not None) == ([1.5] * arrivals, tokens, failed)


def test_rows_become_a_table_and_a_plot(tmp_path: Path) -> None:
    rows = [summarize([sample(0.0, 0.1, 0.12, 0.14)], wall_s, ARGUMENTS) for wall_s in (1.0, 2.0)]
    lines = table(rows).splitlines()
    assert len(lines) == 3
    assert lines[1].split()[:5] == ["10→3,", "2", "at", "a", "time"]
    assert len({len(line) for line in lines}) == 1
    file = tmp_path / "plot.png"
    draw({"one": rows, "other": rows[:1]}, file)
    assert file.read_bytes().startswith(b"\x89PNG")

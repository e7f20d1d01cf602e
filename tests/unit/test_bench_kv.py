"""What `pdserve bench kv` prints, and what any benchmark says of a busy host."""

from __future__ import annotations

import os
import re

import pytest

from pdserve.bench_kv import Row, as_line, footnotes
from pdserve.machine_load import busy_warning


def row(moving_s: float, plain_gb_per_s: float | None = 10.0) -> Row:
    return Row(10**8, 1000, 10**8, (0.02, 0.02), (moving_s, moving_s), (0.008, 0.008), plain_gb_per_s)


def test_a_line_has_speeds_in_one_unit_beside_their_share() -> None:
    line = as_line(row(0.0125))
    assert line.split() == ["100.0", "MB", "1000", "5.00", "8.00", "12.50", "10.00", "80%"]
    assert footnotes([row(0.0125)]) == []


@pytest.mark.parametrize(("moving_s", "share"), [(0.00996, "100%"), (0.0099, "101%*"), (0.005, "200%*")])
def test_a_share_above_everything_is_called_noise(moving_s: float, share: str) -> None:
    measured = row(moving_s)
    assert as_line(measured).split()[-1] == share
    notes = footnotes([row(0.0125), measured])
    assert [bool(re.match(r"\* above 100% is noise", note)) for note in notes] == [True] * share.endswith("*")


def test_what_was_not_measured_is_a_dash_or_a_reason() -> None:
    assert as_line(row(0.0125, None)).split()[-2:] == ["-", "-"]
    assert as_line(Row(4 << 30, 99, skipped="no blocks")).split(maxsplit=3) == [
        "4295.0",
        "MB",
        "99",
        "skipped: no blocks",
    ]


def test_the_same_figures_are_in_the_json() -> None:
    told = row(0.0125).as_dict()
    assert (told["gb_per_s"], told["moving_gb_per_s"], told["share"], told["nbytes"]) == (5.0, 8.0, 0.8, 10**8)


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.4, 2, False), (1.1, 2, True), (6.9, 2, True), (6.9, 128, False)]
)
def test_a_busy_host_is_named(load: float, cores: int, busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    warning = busy_warning()
    assert (warning is not None) == busy
    if warning is not None:
        assert f"load average {load} on {cores} cores" in warning

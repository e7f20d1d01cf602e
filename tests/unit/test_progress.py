"""Long work says how far it is, and short work says nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from pdserve import progress
from pdserve.engine.layers.builder import Builder
from pdserve.engine.models import weights
from pdserve.engine.models.registry import describe
from pdserve.engine.parallel.mapping import Mapping
from pdserve.model_store import read_config
from pdserve.progress import Progress
from tests.unit.test_parallel_weights import Alone
from tests.unit.tiny_models import save

log = logging.getLogger("tests.progress")


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now_s)


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def test_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    with Progress(log, "capturing graphs", 40, "graphs") as work:
        for _ in range(40):
            clock.now_s += 0.3
            work.advance()
    assert said.messages == [
        "capturing graphs: 42% (17 of 40 graphs), 5 s",
        "capturing graphs: 85% (34 of 40 graphs), 10 s",
    ]


def test_short_or_quiet_work_says_nothing(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    with Progress(log, "short", 2, "parts") as work:
        clock.now_s += 4.9
        work.advance()
    with Progress(log, "quiet", 2, "parts", quiet=True) as work:
        clock.now_s += 60
        work.advance()
    assert said.messages == []


def test_steps_are_done_when_the_next_begins(monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    with Progress(log, "converting m", 4, "steps") as work:
        for step in ("reading", "writing"):
            work.step(step)
            clock.now_s += 6
            work.beat()
            work.beat()
    assert said.messages == [
        "converting m: 0% (0 of 4 steps), 6 s, reading",
        "converting m: 25% (1 of 4 steps), 12 s, writing",
    ]


@pytest.mark.parametrize("rank", [0, 1])
def test_weights_are_counted_by_the_first_rank(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    save("llama-mha-biases-tied", tmp_path)
    for fill in (weights.load, lambda _, build: weights.fill_randomly(build)):
        said.clear()
        build = Builder(torch.float32, torch.device("cpu"), Alone(Mapping(rank=rank, tp_size=2)))
        describe(read_config(tmp_path)).build(build)
        fill(tmp_path, build)
        assert [": 100% (" in line for line in said.messages[-1:]] == [True][rank:]


def test_layers_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    save("llama-mha-biases-tied", tmp_path)
    config, build = describe(read_config(tmp_path)), Builder(torch.float32, torch.device("cpu"))
    config.build(build)
    build.finish()
    num_layers = config.num_layers
    assert said.messages[-1].startswith(f"laying out weights: 100% ({num_layers} of {num_layers} layers)")

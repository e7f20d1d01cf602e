"""What a rank tells its exporter while it launches a step."""

from __future__ import annotations

from pathlib import Path

import pytest

from pdserve.engine.run import step_executor
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BatchItem, BlockCopy
from pdserve.protocol import Key
from tests.unit.tiny_models import GREEDY, Driver, args, save

NUM_LAYERS = 3
LAYER_BYTES_PER_TOKEN = 2 * 2 * 8 * 4  # keys and values, two heads of eight dimensions, float32


class Recorder:
    """An exporter that notes what it is told is computed, and is asked for nothing else."""

    def __init__(self) -> None:
        self.told: list[tuple[Key, int, int | None]] = []

    def computed(self, key: Key, num_tokens: int, num_layers: int | None = None) -> None:
        self.told.append((key, num_tokens, num_layers))

    def offer(self, *_: object) -> None:
        raise AssertionError("a runner offers nothing")

    finish = abort = offer


@pytest.mark.parametrize(
    ("pushed_bytes", "layers"),
    [(1, [1, 2, 3]), (6 * LAYER_BYTES_PER_TOKEN, [1, 2, 3]), (12 * LAYER_BYTES_PER_TOKEN, [2, 3]), (1 << 30, [3])],
)
def test_layers_are_told_as_soon_as_they_are_worth_a_message(
    pushed_bytes: int, layers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_executor, "_PUSHED_BYTES", pushed_bytes)
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path))
    driver, recorder = Driver(runner), Recorder()
    runner.exporter = recorder
    prompt, first, second = list(range(2, 11)), Key("first", 0), Key("second", 0)
    items = [
        BatchItem(prompt[3:], 3, [driver.blocks(9)], 1, GREEDY, prompt, export_key=first),
        BatchItem(prompt[:4], 0, [driver.blocks(9)], 0, GREEDY, prompt, export_key=second),
        BatchItem(prompt, 0, [driver.blocks(9)], 1, GREEDY, prompt),
    ]
    launched: list[int] = []
    runner.executor.on_launched = lambda: launched.append(len(recorder.told))
    runner.launch(items).results()
    assert recorder.told == [told for count in layers for told in ((first, 9, count), (second, 4, count))]
    assert launched == [len(recorder.told)], "the step counts as launched when all of it is"


class Broken(Exception):
    """Of a device that fails in the middle of a launch."""


def test_copies_and_steps_that_fail_count_as_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks run the same, and an import into blocks that were freed waits for what was enqueued: both rely on the
    count."""
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path))
    driver, launched = Driver(runner), list[str]()
    runner.executor.on_launched = lambda: launched.append("launched")
    item = BatchItem([2, 3], 0, [driver.blocks(2)], 1, GREEDY, [2, 3])
    runner.launch([], [BlockCopy("duplicate", 0, 1)]).results()
    assert len(launched) == 1
    runner.launch([item], [BlockCopy("duplicate", 0, 1)]).results()
    assert len(launched) == 3

    def fail(*_: object) -> None:
        raise Broken

    monkeypatch.setattr(runner.executor._decoder, "logits", fail)
    with pytest.raises(Broken):
        runner.launch([item])
    assert len(launched) == 4
    monkeypatch.setattr(runner.executor._copier, "run", fail)
    with pytest.raises(Broken):
        runner.launch([item], [BlockCopy("duplicate", 0, 1)])
    assert len(launched) == 5

"""What a rank hands to its decoder for a step, and tells its exporter while it launches one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pdserve.engine.layers.step_input import StepInput
from pdserve.engine.run import step_executor
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.step import pack_eager
from pdserve.engine.run.step_executor import StepExecutor
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


class Listener:
    """Stands in for a decoder, and notes what it is given."""

    def __init__(self) -> None:
        self.steps: list[StepInput] = []

    def forward(self, step: StepInput, _: object) -> Tensor:
        self.steps.append(step)
        num_rows = len(step.token_ids) if step.outputs is None else len(step.outputs.rows)
        return torch.arange(float(num_rows))[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_each_cache_group_has_its_pool_slots_and_tables() -> None:
    listener: Any = Listener()
    pools = [torch.zeros(9, layers, 2, 1, 4, 2) for layers in (1, 3)]
    executor = StepExecutor(listener, pools, 4)
    items = [
        BatchItem([7, 8, 9], 4, [[5, 3], [-1, 8]], 2, GREEDY),
        BatchItem([4, 4, 4], 0, [[1], [2]], 1, GREEDY),
        BatchItem([1], 2, [[6], [0]], 1, GREEDY),
    ]
    logits, greedy = executor.run(pack_eager(items, 4))
    assert (len(logits), greedy) == (4, None)
    (step,) = listener.steps
    assert [group.pool for group in step.groups] == pools
    assert [group.slots.tolist() for group in step.groups] == [
        [26, 12, 13, 14, 4, 5, 6],
        [2, 32, 33, 34, 8, 9, 10],
    ]
    for group, tables in zip(step.groups, ([[6, 0], [5, 3], [1, 0]], [[0, 0], [0, 8], [2, 0]]), strict=True):
        assert group.batch.block_tables.tolist() == tables
        assert (group.batch.q_lens, group.batch.seq_lens) == ([1, 3, 3], [3, 7, 3])
    assert step.outputs is not None
    assert step.outputs.rows.tolist() == [0, 2, 3, 6]
    for batch, tables in zip(step.outputs.batches, ([6, 5, 5, 1], [0, 0, 0, 2]), strict=True):
        assert batch.block_tables[:, 0].tolist() == tables
        assert (batch.q_lens, batch.seq_lens) == ([1] * 4, [3, 6, 7, 3]), "a draft sees what is before it"
        assert batch.seq_lens_tensor.tolist() == batch.seq_lens

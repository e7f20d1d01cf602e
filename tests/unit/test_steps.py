"""Packed steps: what the device is told, and that a token may be named by its place in the step before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.step import LENGTH, POSITION, PREVIOUS, SLOT, TOKEN, GraphPacker, pack_eager
from pdserve.engine.schedule.batch import BatchItem
from tests.unit.tiny_models import GREEDY, Driver, args, save

WIDTH = 4


def decode(token: int, start: int, blocks: list[int], previous: int | None = None) -> BatchItem:
    return BatchItem([token], start, [blocks], 1, GREEDY, (), (), None, False, previous)


def test_an_eager_step_puts_decodes_first_and_the_longest_of_them_first() -> None:
    items = [
        BatchItem([7, 8, 9], 4, [[5, 3]], 0, GREEDY),
        decode(1, 2, [6]),
        decode(0, 9, [0, 2, 1], previous=5),
    ]
    step = pack_eager(items, WIDTH)
    parts = np.split(step.values, np.cumsum(step.sizes)[:-1])
    tokens, positions, slots, q_starts, seq_lens, tables, unknown, previous, *told = [p.tolist() for p in parts]
    assert (tokens, positions) == ([0, 1, 7, 8, 9], [9, 2, 4, 5, 6])
    assert slots == [1 * WIDTH + 1, 6 * WIDTH + 2, 3 * WIDTH, 3 * WIDTH + 1, 3 * WIDTH + 2]
    assert (q_starts, seq_lens) == ([0, 1, 2, 5], [10, 3, 7])
    assert tables == [0, 2, 1, 6, 0, 0, 5, 3, 0]
    assert (unknown, previous) == ([0], [5])
    assert told == [[0, 1], [2, 1], [0, 1]], "rows, items and places of those that sample"
    assert (step.kind, step.sampled_items, step.sampled_lens) == ("eager", told[1], [10, 3])


def test_a_token_is_drawn_after_each_draft() -> None:
    items = [BatchItem([7, 8, 9], 4, [[5, 3]], 3, GREEDY), decode(1, 2, [6]), BatchItem([4, 4], 0, [[1]], 1, GREEDY)]
    step = pack_eager(items, WIDTH)
    *_, rows, owners, places = np.split(step.values, np.cumsum(step.sizes)[:-1])
    assert step.seq_lens == [3, 7, 2], "the decode, then what has several tokens"
    assert rows.tolist() == [0, 1, 2, 3, 5]
    assert owners.tolist() == step.sampled_items == [1, 0, 0, 0, 2]
    assert places.tolist() == [0, 1, 1, 1, 2]
    assert step.sampled_lens == [3, 5, 6, 7, 2], "what each of these rows may see"


def test_an_eager_step_has_slots_and_tables_of_each_group() -> None:
    items = [BatchItem([7, 8], 7, [[5, 3, 2], [-1, 8, 9]], 0, GREEDY), BatchItem([1], 2, [[6], [0]], 1, GREEDY)]
    step = pack_eager(items, WIDTH)
    _, _, slots, q_starts, _, tables, *_ = np.split(step.values, np.cumsum(step.sizes)[:-1])
    assert q_starts.tolist() == [0, 1, 3]
    assert slots.reshape(2, 3).tolist() == [[26, 15, 8], [2, 35, 36]]
    assert tables.reshape(2, 2, 3).tolist() == [[[6, 0, 0], [5, 3, 2]], [[0, 0, 0], [0, 8, 9]]], "freed is any block"


def test_a_graph_has_slots_and_tables_of_each_group() -> None:
    packer = GraphPacker([2], WIDTH, 4, pad=True, num_groups=2)
    tables = [[5, 3], [-1, 8]]
    step = packer.pack([BatchItem([9], 5, tables, 1, GREEDY)])
    assert step is not None
    rows, updates = np.split(step.values, [6 * 2])
    assert rows.reshape(6, 2).T.tolist() == [[9, 5, 13, 6, -1, 33], [0, 0, -1, 0, -1, -1]]
    assert updates.reshape(2, -1).tolist() == [[0, 1, 8, 9], [5, 3, 0, 8]], "the second group's table follows two rows"
    for table in tables:
        table.append(7)
    step = packer.pack([BatchItem([9], 8, tables, 1, GREEDY)])
    assert step is not None
    assert step.values[6 * 2 :].tolist() == [2, 10, 7, 7]
    tables[0] = [5, 3, 1]
    step = packer.pack([BatchItem([9], 8, tables, 1, GREEDY)])
    assert step is not None
    assert step.values[6 * 2 :].tolist() == [0, 1, 2, 5, 3, 1], "another list may differ anywhere"


def rows_of(packer: GraphPacker, items: list[BatchItem]) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Rows [5, size] and (place, block) of the table updates."""
    step = packer.pack(items)
    assert step is not None
    assert step.kind == "decodes"
    rows, updates = np.split(step.values, [5 * step.size])
    at, blocks = updates.reshape(2, -1).tolist()
    return rows.reshape(5, step.size), list(zip(at, blocks, strict=True))


def test_a_graph_step_sends_only_what_the_device_does_not_have() -> None:
    packer = GraphPacker([2, 4], WIDTH, 8, pad=True)
    first, second = [5, 3], [6]
    rows, updates = rows_of(packer, [decode(9, 5, first), decode(0, 3, second, previous=0)])
    assert rows[[TOKEN, POSITION, SLOT, LENGTH, PREVIOUS]].T.tolist() == [[9, 5, 13, 6, -1], [0, 3, 27, 4, 0]]
    assert updates == [(0, 5), (1, 3), (8, 6)]
    second.append(1)
    rows, updates = rows_of(packer, [decode(9, 6, first), decode(8, 4, second)])
    assert updates == [(9, 1)], "a table grew at its end"
    rows, updates = rows_of(packer, [decode(8, 5, second), decode(1, 0, [2]), decode(1, 0, [4])])
    assert rows.shape == (5, 4)
    assert rows[:, 3].tolist() == [0, 0, -1, 0, -1], "padding writes nowhere and sees nothing"
    assert updates == [(0, 6), (1, 1), (8, 2), (16, 4)], "another sequence stands in a row"
    packer.forget()
    assert rows_of(packer, [decode(8, 6, second)])[1] == [(0, 6), (1, 1)]


@pytest.mark.parametrize(
    ("items", "pad"),
    [
        ([decode(1, 0, [1])] * 5, True),
        ([decode(1, 0, [1])] * 3, False),
        ([decode(1, 0, [1]), BatchItem([1, 2], 0, [[2]], 1, GREEDY)], True),
        ([BatchItem([1], 0, [[2]], 0, GREEDY)], True),
    ],
    ids=["too many", "no padding", "prefill", "samples nothing"],
)
def test_steps_that_no_graph_can_run(items: list[BatchItem], pad: bool) -> None:
    assert GraphPacker([2, 4], WIDTH, 8, pad).pack(items) is None


def test_a_token_may_be_named_by_its_place_in_the_step_before(tmp_path: Path) -> None:
    save("llama", tmp_path)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    runner = ModelRunner(args(tmp_path))
    driver = Driver(runner)
    expected = driver.generate(prompts, [[5], [3]], 4)
    blocks = [driver.blocks(9) for _ in prompts]
    before = [BatchItem(prompt, 0, [own], 1, GREEDY, prompt) for prompt, own in zip(prompts, blocks, strict=True)]
    steps = [runner.launch(before)]
    for number in range(3):
        # The order changes from step to step, so places are not what they were.
        places = range(2) if number % 2 else reversed(range(2))
        before = [
            BatchItem([0], each.start + len(each.token_ids), each.tables, 1, GREEDY, each.prompt_ids, (), previous=at)
            for at, each in ((at, before[at]) for at in places)
        ]
        steps.append(runner.launch(before))
    owners = [0, 1]
    outputs: list[list[int | None]] = [[], []]
    for number, step in enumerate(steps):
        if number and not (number - 1) % 2:
            owners = owners[::-1]
        for owner, result in zip(owners, step.results(), strict=True):
            outputs[owner].extend(result.token_ids)
    assert outputs == expected

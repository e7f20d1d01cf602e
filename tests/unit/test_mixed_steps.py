"""Steps of decodes and prompts' chunks in fixed sizes, as CUDA graphs have them, on a CPU: the same tokens as without.

Capturing is stood in for by running the same operations at each replay; the kernels run in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pdserve.engine.run import decode_graphs
from pdserve.engine.run.decode_graphs import DecodeGraphs, _Captured
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.ranks.messages import Capture
from pdserve.engine.run.step import TOKEN, ChunkRoom, GraphPacker, Step, mixed_sizes, pack_eager
from pdserve.engine.schedule.batch import BatchItem
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import Key
from tests.unit.tiny_models import GREEDY, TOKENS_PER_BLOCK, answers, args, random_prompts, save

ROOM = ChunkRoom(num_tokens=12, num_seqs=2, max_context=256)
SIZES, MAX_BLOCKS = [1, 2, 4, 8], 64
LENGTHS = (3, 30, 17, 1, 25)


@dataclass
class Rerun:
    """Takes the place of a CUDA graph."""

    run: Callable[[], tuple[Tensor, Tensor]]
    outputs: tuple[Tensor, Tensor]

    def replay(self) -> None:
        for kept, new in zip(self.outputs, self.run(), strict=True):
            kept.copy_(new)


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(graphs: DecodeGraphs, size: int, run: Callable[[int], tuple[Tensor, Tensor]], _: Any) -> _Captured:
        outputs = run(size)
        graph: Any = Rerun(lambda: run(size), outputs)
        return _Captured(graph, *outputs)

    def replay(captured: _Captured, num_sampled: int) -> tuple[Tensor, Tensor]:
        logits, tokens = replay_in_place(captured, num_sampled)
        # A GPU copies them to the host before the next step; here that would be the same memory.
        return logits.clone(), tokens.clone()

    replay_in_place = decode_graphs._replay
    monkeypatch.setattr(decode_graphs, "_replay", replay)
    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)


def generate(runner: ModelRunner, overlap: bool, sampling: dict[str, Any]) -> list[list[int]]:
    runner.is_asynchronous = True
    options = EngineOptions(max_mixed_prefill_tokens=ROOM.num_tokens, overlap=overlap, enable_block_reuse=False)
    return answers(Engine(runner, options), random_prompts(LENGTHS), 6, **sampling)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # of empty tiles
@pytest.mark.parametrize(
    ("sampling", "overlap"),
    [({"temperature": 0.0}, True), ({"temperature": 1.2, "top_p": 0.9}, False)],
    ids=["greedy", "drawn"],
)
def test_steps_in_fixed_sizes_change_no_token(
    sampling: dict[str, Any], overlap: bool, rerun: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path))
    expected = generate(runner, overlap, sampling)
    steps: list[Step] = []
    monkeypatch.setattr(runner, "_pack", lambda items: steps.append(pack(items)) or steps[-1])
    packer = GraphPacker(SIZES, TOKENS_PER_BLOCK, MAX_BLOCKS, True, ROOM)

    def pack(items: list[BatchItem]) -> Step:
        return packer.pack(items) or pack_eager(items, TOKENS_PER_BLOCK)

    runner.rank.decoder._attention = "triton"
    with torch.inference_mode():
        runner.executor.obey(Capture(SIZES, MAX_BLOCKS, ROOM))
    assert generate(runner, overlap, sampling) == expected
    kinds = [step.kind for step in steps]
    assert kinds.count("mixed") > 5
    assert kinds.count("decodes") > 5


def chunk(tokens: list[int], start: int, blocks: list[int], sample: bool = False, **others: Any) -> BatchItem:
    return BatchItem(tokens, start, [blocks], int(sample), GREEDY, **others)


DECODE = chunk([9], 5, [7, 3], sample=True, previous=1)


def test_a_mixed_step_says_where_everything_is() -> None:
    packer = GraphPacker(SIZES, TOKENS_PER_BLOCK, 3, True, ROOM)
    items = [DECODE, chunk([1, 2, 3, 4], 2, [5, 6]), chunk([7, 8, 9], 0, [4], sample=True)]
    step = packer.pack(items)
    assert step is not None
    assert (step.kind, step.size, step.sampled_items) == ("mixed", 8, [0, 2]), (
        "the smallest size that has room for chunks"
    )
    sizes = [5 * 8, 5 * 12, 2 * 3, 2 * 3, 8 + 2, 8 + 2]
    rows, chunks, spans, tables, sampled, of_items, updates = np.split(step.values, np.cumsum(sizes))
    assert rows.reshape(5, 8)[:, :2].T.tolist() == [[9, 5, 3 * 4 + 1, 6, 1], [0, 0, -1, 0, -1]]
    tokens, positions, slots, _, previous = chunks.reshape(5, 12).tolist()
    assert tokens == [1, 2, 3, 4, 7, 8, 9, 0, 0, 0, 0, 0]
    assert positions[:7] == [2, 3, 4, 5, 0, 1, 2]
    assert slots == [22, 23, 24, 25, 16, 17, 18, -1, -1, -1, -1, -1]
    assert previous == [-1] * 12
    assert spans.reshape(2, 3).tolist() == [[8, 4, 2], [12, 3, 0]]
    assert tables.reshape(2, 3).tolist() == [[5, 6, 0], [4, 0, 0]]
    assert sampled.tolist() == [0, 8 + 6, *[0] * 8]
    assert of_items.tolist() == [0, 2, *[0] * 8]
    assert updates.tolist() == [0, 1, 7, 3]


def test_drafts_take_the_room_of_chunks_and_decodes_come_first() -> None:
    packer = GraphPacker(SIZES, TOKENS_PER_BLOCK, 3, True, ROOM)
    drafted = BatchItem([4, 5, 6], 6, [[8, 9, 1]], 3, GREEDY)
    items = [drafted, DECODE, chunk([1] * 5, 0, [5, 6], sample=True)]
    step = packer.pack(items)
    assert step is not None
    assert (step.kind, step.sampled_items) == ("mixed", [1, 0, 0, 0, 2])
    sizes = [5 * 8, 5 * 12, 2 * 3, 2 * 3, 8 + 2, 8 + 2]
    rows, chunks, spans, tables, sampled, of_items, _ = np.split(step.values, np.cumsum(sizes))
    assert rows.reshape(5, 8)[TOKEN].tolist() == [9, 0, 0, 0, 0, 0, 0, 0]
    assert chunks.reshape(5, 12)[:2, :3].tolist() == [[4, 5, 6], [6, 7, 8]]
    assert spans.reshape(2, 3).tolist() == [[8, 3, 6], [11, 5, 0]]
    assert tables.reshape(2, 3).tolist() == [[8, 9, 1], [5, 6, 0]]
    assert sampled.tolist() == [0, 8, 9, 10, 15, *[0] * 5]
    assert of_items.tolist() == [1, 0, 0, 0, 2, *[0] * 5]


def test_more_draws_than_a_graph_has_rows_for_run_eagerly() -> None:
    packer = GraphPacker([1], TOKENS_PER_BLOCK, 3, True, ROOM)
    drafted = [BatchItem([4] * 7, 0, [[8, 9]], num_sampled, GREEDY) for num_sampled in (3, 4)]
    assert packer.pack(drafted[:1]) is not None
    assert packer.pack(drafted[1:]) is None


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk([1] * 13, 0, [1, 2, 3, 4])],
        [chunk([1] * 6, 0, [1, 2])],
        [chunk([1] * 4, 0, [number]) for number in range(3)],
        [chunk([1] * 12, 250, list(range(66)))],
        [chunk([1] * 12, 0, [1, 2, 3], want_prompt_logprobs=True)],
        [chunk([1] * 12, 0, [1, 2, 3], export_key=Key("a", 0))],
    ],
    ids=["too many tokens", "mostly padding", "too many sequences", "too long", "scored", "exported"],
)
def test_chunks_that_no_graph_has_room_for(chunks: list[BatchItem]) -> None:
    assert GraphPacker(SIZES, TOKENS_PER_BLOCK, 66, True, ROOM).pack([DECODE, *chunks]) is None
    whole = chunk([1] * 12, 0, [1, 2, 3])
    assert GraphPacker(SIZES, TOKENS_PER_BLOCK, 66, True, ROOM).pack([DECODE, whole]) is not None
    assert GraphPacker(SIZES, TOKENS_PER_BLOCK, 66, True).pack([DECODE, whole]) is None


def test_some_sizes_have_room_for_chunks_and_the_largest_is_one_of_them() -> None:
    assert mixed_sizes([1, 2, 4, 8, 16, 24, 32, 40]) == [8, 40]
    assert mixed_sizes([3]) == [3]

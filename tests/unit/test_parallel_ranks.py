"""A model over several ranks computes what one rank computes: processes of this host, joined by gloo."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pdserve.config import KvCacheConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.ranks import messages
from pdserve.engine.run.step import Step, pack_eager
from pdserve.errors import ConfigError
from pdserve.protocol import Sampling
from tests.rank_processes import followers
from tests.unit.test_models import prompt_of
from tests.unit.tiny_models import CONFIGS, TOKENS_PER_BLOCK, Driver, args, save

LENGTHS = (1, 4, 5, 23, 40)
CHUNKS = [[1], [1, 2, 1], [4, 1], [1, 3, 5, 1, 13], [8, 1, 31]]
NUM_NEW_TOKENS = 12
SAMPLED = Sampling(seed=3, max_tokens=NUM_NEW_TOKENS, temperature=0.9, top_p=0.9)

TP2: dict[str, Any] = {"tensor_parallel_size": 2}
PP2: dict[str, Any] = {"pipeline_parallel_size": 2}
# Each family in some layout, and one family in all of them.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", TP2),
    ("llama", {"tensor_parallel_size": 4}),  # more ranks than KV heads: 2 and 1 query heads of each
    ("llama", {"pipeline_parallel_size": 2, "pp_partition": (1, 2)}),
    ("llama-mha-biases-tied", {"tensor_parallel_size": 3}),  # 2, 1 and 1 heads
    ("llama-mha-biases-tied", {**TP2, **PP2}),
    ("llama3-rope", TP2),
    ("llama-linear-rope", PP2),
    ("llama-yarn-rope", TP2),
    ("mistral-own-head-dim", TP2),
    ("qwen2-mqa-tied", TP2),  # one KV head on both
    ("qwen3", {**TP2, **PP2}),
    ("qwen3-biases", TP2),  # 2 and 1 KV heads
    ("gpt2", TP2),
    ("gpt2", PP2),
]


@contextmanager
def runner_of(folder: Path, **changes: Any) -> Iterator[ModelRunner]:
    """A runner whose followers are gone afterwards."""
    runner = ModelRunner(args(folder, num_threads=1, **changes))
    try:
        yield runner
    finally:
        ranks = followers()
        runner.close()
        assert not psutil.wait_procs(ranks, timeout=0)[1]


def answers(runner: ModelRunner) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    """Greedy and sampled continuations in mixed batches, and all log-probabilities of a prompt scored in pieces."""
    prompts = [prompt_of(length, length) for length in LENGTHS]
    greedy = Driver(runner).generate(prompts, CHUNKS, NUM_NEW_TOKENS)
    sampled = Driver(runner, seed=1).generate(prompts, CHUNKS, NUM_NEW_TOKENS, [SAMPLED] * len(prompts))
    scored = Driver(runner, seed=2).score(prompt_of(120, 7)).prompt_logprobs
    assert scored is not None
    return greedy, sampled, torch.tensor([[value for _, value in sorted(entry.top)] for entry in scored])


def test_every_family_is_among_the_cases() -> None:
    assert {name for name, _ in CASES} == set(CONFIGS)


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_answers_are_those_of_one_rank(
    name: str, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.engine.run.step._SCORED_ROWS", 50)
    save(name, tmp_path)
    expected = answers(ModelRunner(args(tmp_path, num_threads=1)))
    with runner_of(tmp_path, **layout) as runner:
        runner.warmup()
        assert not runner.pool.tensor.any()
        greedy, sampled, scores = answers(runner)
    assert greedy == expected[0]
    assert sampled == expected[1]
    torch.testing.assert_close(scores, expected[2], rtol=1e-4, atol=2e-4)


def test_blocks_are_what_the_fullest_rank_has_room_for(tmp_path: Path) -> None:
    save("qwen3-biases", tmp_path)
    cache = KvCacheConfig(cpu_memory_bytes=1 << 20, tokens_per_block=TOKENS_PER_BLOCK)
    with runner_of(tmp_path, kv_cache_config=cache, load_format="DUMMY", pp_partition=(1, 2), **PP2) as runner:
        # Rank 0 has one of three layers: its followers' blocks are twice as large.
        assert runner.limits.num_blocks == (1 << 19) // (2 * runner.pool.block_bytes)


def test_steps_survive_the_way_to_a_follower() -> None:
    from pdserve.engine.schedule.batch import BatchItem

    items = [BatchItem(prompt_of(9, 9), 3, [[4, 2, 7]], 1, SAMPLED, prompt_of(12, 1), want_prompt_logprobs=True)]
    step = pack_eager(items, TOKENS_PER_BLOCK)
    assert step.scored
    for sent in (step, Step("decodes", step.values, [0, 1], 4), Step("mixed", step.values, [0, 2], 4)):
        received = messages.decode(messages.encode(sent))
        assert isinstance(received, Step)
        assert received.values.flags.writeable
        assert received.values.tolist() == sent.values.tolist()
        for field in set(Step.__struct_fields__) - {"values"}:
            assert getattr(received, field) == getattr(sent, field)


def test_too_many_ranks_are_refused_before_any_is_started(tmp_path: Path) -> None:
    save("llama", tmp_path)
    with pytest.raises(ConfigError, match="up to 6, got 7") as caught:
        ModelRunner(args(tmp_path, tensor_parallel_size=7))
    assert caught.value.param == "tensor_parallel_size"
    assert not followers()

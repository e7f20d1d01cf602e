"""Blocks that leave a GPU for the host's memory come back as they were, in order, and without making the host wait."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import KvCacheConfig
from pdserve.engine.run.block_copier import BlockCopier
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import EngineStats
from tests.gpu.test_model_runner import waits_recorded
from tests.unit.engine_bench import Client, request
from tests.unit.tiny_models import TOKENS_PER_BLOCK, VOCAB_SIZE, args, save

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def conversations() -> list[list[int]]:
    """Prompts of which many begin like another, and part within a block."""
    chance = random.Random(0)
    stems = [[chance.randrange(VOCAB_SIZE) for _ in range(40)] for _ in range(6)]
    return [
        [*chance.choice(stems)[: chance.randrange(8, 40)], *(chance.randrange(VOCAB_SIZE) for _ in range(5))]
        for _ in range(60)
    ]


def generate(folder: Path, **cache: Any) -> tuple[list[list[int]], EngineStats]:
    """Greedy outputs of all conversations, a few at a time."""
    config = KvCacheConfig(tokens_per_block=TOKENS_PER_BLOCK, **cache)
    chosen = args(folder, device="cuda", kv_cache_config=config, max_batch_size=4)
    runner = ModelRunner(chosen)
    runner.warmup()
    engine, client = Engine(runner, EngineOptions.from_args(chosen)), Client()
    prompts = conversations()
    for number, prompt in enumerate(prompts):
        engine.submit(request(str(number), prompt, temperature=0.0, max_tokens=9))
    while engine.has_work:
        client.take(engine.step())
    engine.check()
    return [client.tokens(str(number)) for number in range(len(prompts))], engine.stats()


@pytest.mark.parametrize("copy", [True, False])
def test_answers_do_not_depend_on_where_blocks_have_been(tmp_path: Path, copy: bool) -> None:
    save("llama", tmp_path)
    computed, _ = generate(tmp_path, max_tokens=2000, enable_block_reuse=False)
    tokens, stats = generate(tmp_path, max_tokens=240, host_cache_size=1 << 20, copy_on_partial_reuse=copy)
    assert tokens == computed
    assert min(stats.offloaded_blocks, stats.onboarded_blocks, stats.partially_reused_blocks) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_copies_are_made_in_order_and_nobody_waits(dtype: torch.dtype) -> None:
    filled = torch.arange(8.0, device="cuda")[:, None].repeat(1, 1 << 20)
    pool = filled.to(dtype)
    copier = BlockCopier([pool], 3)
    torch.cuda.synchronize()
    with waits_recorded() as waits:
        copier.run(
            [
                BlockCopy("offload", 0, 2),
                BlockCopy("duplicate", 5, 0),
                BlockCopy("offload", 0, 1),
                BlockCopy("onboard", 2, 7),
                BlockCopy("onboard", 1, 6),
            ]
        )
    assert waits == []
    assert pool[:, ::4096].float().unique(dim=1).flatten().tolist() == [5, 1, 2, 3, 4, 5, 5, 0]

"""A model over two GPUs, joined by NCCL, computes what one computes; with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import CudaGraphConfig, KvCacheConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import EngineError
from pdserve.llm import LLM, SamplingParams
from tests.rank_processes import followers
from tests.unit.engine_bench import Client, request
from tests.unit.test_models import prompt_of
from tests.unit.tiny_models import Driver, args, save

pytestmark = [
    pytest.mark.multigpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
]

LENGTHS = (1, 4, 5, 23, 40)
CHUNKS = [[1], [1, 2, 1], [4, 1], [1, 3, 5, 1, 13], [8, 1, 31]]
LAYOUTS: dict[str, dict[str, Any]] = {"tp": {"tensor_parallel_size": 2}, "pp": {"pipeline_parallel_size": 2}}
GRAPHS = {"eager": None, "graphs": CudaGraphConfig(batch_sizes=(1, 2, 5))}


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def test_requests_fail_when_a_rank_dies(tmp_path: Path) -> None:
    """Rank 0 then waits in a collective that only an abort ends."""
    save("llama", tmp_path)
    cache = KvCacheConfig(max_tokens=2048)
    with LLM(
        tmp_path, skip_tokenizer_init=True, dtype="float32", max_batch_size=4, kv_cache_config=cache, **LAYOUTS["tp"]
    ) as llm:
        (follower,) = followers()
        pending = llm.generate_async([5, 6, 7], SamplingParams(max_tokens=240, ignore_eos=True))
        follower.kill()
        with pytest.raises(EngineError, match="ended with SIGKILL"):
            pending.result(30)
        with pytest.raises(EngineError, match="ended with SIGKILL"):
            llm.generate_async([5, 6, 7], SamplingParams(max_tokens=3)).result(30)


@pytest.mark.parametrize(
    ("name", "layout", "graphs"),
    [("llama", "tp", "graphs"), ("llama", "pp", "graphs"), ("qwen3-biases", "tp", "eager")],
)
def test_answers_are_those_of_one_gpu(name: str, layout: str, graphs: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    prompts = [prompt_of(length, length) for length in LENGTHS]
    alone = ModelRunner(args(tmp_path, device="cuda", cuda_graph_config=None))
    expected = Driver(alone).generate(prompts, CHUNKS, 20)
    scores = Driver(alone, seed=1).score(prompt_of(90, 7)).prompt_logprobs
    runner = ModelRunner(args(tmp_path, device="cuda", cuda_graph_config=GRAPHS[graphs], **LAYOUTS[layout]))
    try:
        runner.warmup()
        assert not runner.pool.tensor.any()
        assert Driver(runner).generate(prompts, CHUNKS, 20) == expected
        found = Driver(runner, seed=1).score(prompt_of(90, 7)).prompt_logprobs
    finally:
        runner.close()
    assert scores is not None
    assert found is not None
    assert [entry.logprob for entry in found] == pytest.approx([entry.logprob for entry in scores], abs=1e-3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlapped_steps_name_tokens_of_the_step_before(layout: str, tmp_path: Path) -> None:
    """Sampled on rank 0 and never seen by the host before the next step is launched on both."""
    save("llama", tmp_path)
    answers = []
    for changes in ({}, LAYOUTS[layout]):
        runner = ModelRunner(args(tmp_path, device="cuda", **changes))
        runner.warmup()
        client = Client()
        engine = Engine(runner)
        for index in range(3):
            engine.submit(request(f"r{index}", prompt_of(5 + index, index), max_tokens=30, temperature=0.8))
        while engine.has_work:
            client.take(engine.step())
        runner.close()
        answers.append([client.tokens(f"r{index}") for index in range(3)])
    assert answers[0] == answers[1]
    assert [len(tokens) for tokens in answers[0]] == [30] * 3

"""The runner on a GPU computes what it computes on the CPU, and launches a step without waiting for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import CudaGraphConfig, KvCacheConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.sampler import Sampler
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Sampling
from tests.unit.test_model_plugins import PLUGIN, GroupedDriver, Reference, write_toy
from tests.unit.tiny_models import CONFIGS, GREEDY, TOKENS_PER_BLOCK, VOCAB_SIZE, Driver, args, save

pytestmark = pytest.mark.gpu

LENGTHS = (1, 4, 5, 23, 40)
CHUNKS = [[1], [1, 2, 1], [4, 1], [1, 3, 5, 1, 13], [8, 1, 31]]


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@contextmanager
def waits_recorded() -> Iterator[list[str]]:
    """Every time the host waits for the device."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits += [str(warning.message) for warning in caught if "synchronizing CUDA" in str(warning.message)]


def prompt_of(length: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("backend", ["TRITON", "TORCH"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_the_cpu(name: str, backend: str, tmp_path: Path) -> None:
    save(name, tmp_path)
    prompts = [prompt_of(length) for length in LENGTHS]
    expected = Driver(ModelRunner(args(tmp_path))).generate(prompts, CHUNKS, 20)
    runner = ModelRunner(args(tmp_path, device="cuda", attn_backend=backend))
    assert Driver(runner).generate(prompts, CHUNKS, 20) == expected


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    scores = [
        Driver(ModelRunner(args(tmp_path, device="cuda", dtype=dtype))).score(prompt_of(40)).prompt_logprobs
        for dtype in ("float32", "bfloat16")
    ]
    assert scores[0] is not None
    assert scores[1] is not None
    errors = [abs(a.logprob - b.logprob) for a, b in zip(*scores, strict=True)]
    assert 0 < sum(errors) / len(errors) < 0.1


def test_a_step_is_launched_without_waiting_for_the_device(tmp_path: Path) -> None:
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path, device="cuda"))
    runner.warmup()
    driver = Driver(runner)
    prompt = prompt_of(9)
    everything: dict[str, Any] = {
        "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.1, "min_tokens": 5, "stop_token_ids": (1,),
        "logprobs": 3, "prompt_logprobs": 2,
    }  # fmt: skip
    items = [
        BatchItem(
            prompt,
            0,
            [driver.blocks(9)],
            1,
            Sampling(seed=1, max_tokens=9, **everything),
            prompt,
            (3, 4),
            want_prompt_logprobs=True,
        ),
        BatchItem(prompt[-1:], 8, [driver.blocks(9)], 1, GREEDY, prompt),
    ]
    runner.launch(items).results()
    with waits_recorded() as waits:
        step = runner.launch(items)
    assert not waits
    results = step.results()
    assert [len(result.token_ids) for result in results] == [1, 1]


def test_draws_are_those_of_the_cpu() -> None:
    logits = torch.randn(500, 3000, generator=torch.Generator().manual_seed(0)) * 3
    requests = [
        BatchItem(
            [0], 0, (), 1, Sampling(seed=seed, max_tokens=1, top_p=(1.0, 0.9, 0.3)[seed % 3], top_k=seed % 4 * 30)
        )
        for seed in range(500)
    ]
    ours, theirs = Sampler([]).sample(logits, requests), Sampler([]).sample(logits.cuda(), requests).cpu()
    assert int((ours != theirs).sum()) <= 1, "a draw may fall on a boundary that rounding has moved"
    halves = [Sampler([]).sample(logits[part].cuda(), requests[part]).cpu() for part in (slice(250), slice(250, 500))]
    assert torch.equal(torch.cat(halves), theirs), "the batch's shape changes nothing"


def test_the_pool_takes_its_fraction_of_free_memory(tmp_path: Path) -> None:
    save("llama", tmp_path)
    torch.cuda.empty_cache()
    free_bytes = torch.cuda.mem_get_info()[0]
    cache = KvCacheConfig(free_gpu_memory_fraction=0.25, tokens_per_block=TOKENS_PER_BLOCK)
    runner = ModelRunner(args(tmp_path, device="cuda", kv_cache_config=cache))
    share = runner.pool.tensor.nbytes / free_bytes
    assert 0.2 < share <= 0.25


@pytest.mark.parametrize(
    ("name", "sizes"), [("llama", None), ("llama", (1, 2)), ("llama", (3, 5)), ("gpt2", (1, 2))], ids=str
)
def test_cuda_graphs_change_no_token(name: str, sizes: tuple[int, ...] | None, tmp_path: Path) -> None:
    """Graphs of every size, padded ones, and batches that fit none, against a runner without graphs."""
    save(name, tmp_path)
    prompts = [prompt_of(length) for length in LENGTHS]
    expected = Driver(ModelRunner(args(tmp_path, device="cuda", cuda_graph_config=None))).generate(prompts, CHUNKS, 20)
    runner = ModelRunner(args(tmp_path, device="cuda", cuda_graph_config=CudaGraphConfig(batch_sizes=sizes)))
    runner.warmup()
    assert runner._graph_packer is not None
    assert Driver(runner).generate(prompts, CHUNKS, 20) == expected
    assert Driver(runner).generate(prompts[:2], [[1], [2, 1]], 20) == expected[:2]


@pytest.mark.parametrize("graphs", [None, CudaGraphConfig(batch_sizes=(1, 2))], ids=["eager", "graphs"])
def test_a_plugins_windows_equal_plain_torch(
    graphs: CudaGraphConfig | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PLUGIN)
    write_toy(tmp_path)
    runner = ModelRunner(args(tmp_path, device="cuda", cuda_graph_config=graphs))
    runner.warmup()
    assert (runner._graph_packer is None) == (graphs is None)
    prompt = prompt_of(40)
    assert GroupedDriver(runner).greedy(prompt, [8, 1, 31], 20) == Reference(tmp_path).greedy(prompt, 20)


def test_a_graph_is_replayed_without_waiting_for_the_device(tmp_path: Path) -> None:
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path, device="cuda"))
    runner.warmup()
    blocks = Driver(runner).blocks(9)
    items = [BatchItem([3], 8, [blocks], 1, GREEDY, prompt_of(9))]
    runner.launch(items).results()
    with waits_recorded() as waits:
        step = runner.launch(items)
    assert not waits
    assert len(step.results()[0].token_ids) == 1


def test_a_probe_writes_to_no_cache_on_a_gpu(tmp_path: Path) -> None:
    save("llama", tmp_path)
    runner = ModelRunner(args(tmp_path, device="cuda"))
    runner.warmup()
    runner.pool.tensor.fill_(0.5)
    runner.probe()
    assert bool((runner.pool.tensor == 0.5).all())

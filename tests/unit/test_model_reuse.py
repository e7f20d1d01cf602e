"""KV that was copied, within the pool or by way of the host, is the KV that would have been computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import KvCacheConfig
from pdserve.engine.run.block_copier import BlockCopier
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule import prompts
from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.errors import ConfigError
from pdserve.protocol import Finished
from tests.unit.engine_bench import Client, request, run
from tests.unit.tiny_models import TOKENS_PER_BLOCK, args, save

LONG = [(7 * index + 3) % 131 for index in range(30)]
PROMPTS = [
    LONG,
    [*LONG[:21], 99, 98, 97],
    [(5 * index + 1) % 131 for index in range(34)],
    [*LONG[:22], 96, 95],
    LONG,
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reuse")
    save("llama", folder)
    return folder


def generate(
    model: Path, layout: dict[str, int] | None = None, **cache: Any
) -> tuple[list[list[int]], list[Finished], Engine]:
    """Greedy outputs of `PROMPTS`, one after the other, over the ranks that `layout` asks for."""
    config = KvCacheConfig(tokens_per_block=TOKENS_PER_BLOCK, **{"max_tokens": 400, **cache})
    dtype = "bfloat16" if config.dtype == "fp8" else "float32"
    chosen = args(model, kv_cache_config=config, dtype=dtype, num_threads=1, **(layout or {}))
    runner = ModelRunner(chosen)
    runner.warmup()
    engine = Engine(runner, EngineOptions.from_args(chosen))
    client = Client()
    for number, prompt in enumerate(PROMPTS):
        engine.submit(request(str(number), prompt, temperature=0.0, max_tokens=6))
        run(engine, client)
    engine.check()
    runner.close()
    names = list(map(str, range(len(PROMPTS))))
    return [client.tokens(name) for name in names], [client.end(name) for name in names], engine


@pytest.fixture(scope="module")
def computed(model: Path) -> list[list[int]]:
    """The outputs without any reuse."""
    tokens, ends, _ = generate(model, enable_block_reuse=False)
    assert {end.usage.cached_tokens for end in ends} == {0}
    assert len({tuple(each) for each in tokens}) == 4
    return tokens


@pytest.mark.parametrize("copy", [True, False])
def test_partial_reuse(model: Path, computed: list[list[int]], copy: bool) -> None:
    tokens, ends, engine = generate(model, copy_on_partial_reuse=copy)
    assert tokens == computed
    # Without copying the first has lost its sixth block to the second, and found the last one idle.
    assert [end.usage.cached_tokens for end in ends] == [0, 21, 0, 22 if copy else 21, 29 if copy else 22]
    assert engine.stats().partially_reused_blocks == 3
    assert engine.stats().offloaded_blocks == 0


def test_choices_share_the_prompt_that_one_of_them_computes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "WORTH_A_STEP_TOKENS", TOKENS_PER_BLOCK)
    together: list[list[list[int]]] = []
    for reuse in (False, True):
        config = KvCacheConfig(tokens_per_block=TOKENS_PER_BLOCK, max_tokens=400, enable_block_reuse=reuse)
        runner = ModelRunner(args(model, kv_cache_config=config, dtype="float32", num_threads=1))
        engine = Engine(runner, EngineOptions(enable_block_reuse=reuse))
        for seed in range(4):
            engine.submit(request(str(seed), LONG, seed=seed, temperature=1.5, max_tokens=6))
        client = run(engine)
        together.append([client.tokens(str(seed)) for seed in range(4)])
        cached = {client.end(str(seed)).usage.cached_tokens for seed in range(4)}
        assert cached == ({0, 28} if reuse else {0})
        engine.check()
    assert together[0] == together[1]
    assert len({tuple(each) for each in together[0]}) == 4


def test_host_offload(model: Path, computed: list[list[int]]) -> None:
    tokens, ends, engine = generate(model, max_tokens=40, host_cache_size=10_000_000, enable_partial_reuse=False)
    assert tokens == computed
    assert [end.usage.cached_tokens for end in ends] == [0, 20, 0, 20, 28]
    stats = engine.stats()
    assert stats.onboarded_blocks >= 7
    assert 0 < stats.host_blocks_used <= stats.host_blocks


def test_every_rank_copies_its_share(model: Path, computed: list[list[int]]) -> None:
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    tokens, ends, engine = generate(model, layout, max_tokens=40, host_cache_size=1_000_000)
    assert tokens == computed
    assert [end.usage.cached_tokens for end in ends][1] == 21
    stats = engine.stats()
    assert stats.onboarded_blocks > 0
    assert stats.partially_reused_blocks > 0


def test_both_at_once_with_a_host_that_is_too_small(model: Path, computed: list[list[int]]) -> None:
    runner = ModelRunner(args(model))
    host_cache_size = 4 * runner.pool.block_bytes + 1
    runner.close()
    tokens, _, engine = generate(model, max_tokens=40, host_cache_size=host_cache_size)
    assert tokens == computed
    assert engine.stats().host_blocks == 4


def test_an_8_bit_cache_is_smaller_and_copied_like_any_other(model: Path) -> None:
    settings = {"dtype": "fp8", "host_cache_size": 1_000_000, "enable_partial_reuse": False}
    roomy, known, full = generate(model, **settings)
    tokens, ends, engine = generate(model, max_tokens=40, **settings)
    assert tokens == roomy
    assert [end.usage.cached_tokens for end in ends] == [end.usage.cached_tokens for end in known]
    assert (full.stats().onboarded_blocks, engine.stats().onboarded_blocks > 0) == (0, True)
    in_32_bits = generate(model, host_cache_size=1_000_000)[2]
    assert engine.stats().host_blocks // in_32_bits.stats().host_blocks == 4


def test_an_8_bit_cache_needs_a_model_in_bfloat16(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_config.dtype.*bfloat16.*float32"):
        ModelRunner(args(model, kv_cache_config=KvCacheConfig(dtype="fp8")))


def test_copies_are_made_in_order() -> None:
    pool = torch.arange(3.0)[:, None].repeat(1, 4)
    copier = BlockCopier([pool], 2)
    copier.run([BlockCopy("offload", 0, 1), BlockCopy("duplicate", 2, 0), BlockCopy("onboard", 1, 2)])
    assert pool[:, 0].tolist() == [2, 1, 0]


def test_copies_stay_in_their_cache_group() -> None:
    pools = [torch.arange(3.0)[:, None].repeat(1, 4), torch.arange(10.0, 14.0)[:, None].repeat(1, 2)]
    copier = BlockCopier(pools, 2)
    copier.run([BlockCopy("offload", 0, 1, group) for group in (0, 1)])
    copier.run([BlockCopy("duplicate", 3, 0, 1), BlockCopy("onboard", 1, 2, 1), BlockCopy("onboard", 1, 1, 0)])
    assert [pool[:, 0].tolist() for pool in pools] == [[0, 0, 2], [13, 11, 10, 13]]


def test_a_host_without_the_memory_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="host_cache_size"):
        BlockCopier([torch.zeros(2, 1 << 20)], 1 << 40)

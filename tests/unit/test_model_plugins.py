"""A family that another distribution brings along, found by its entry point: two kinds of layers, two cache groups."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from pdserve.config import KvCacheConfig
from pdserve.engine.cache_spec import CacheSpec
from pdserve.engine.layers.builder import Builder
from pdserve.engine.models import registry
from pdserve.engine.models.registry import architectures, describe
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BatchItem
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.errors import ConfigError
from pdserve.protocol import CacheGroupLimits
from tests.unit.tiny_models import GREEDY, TOKENS_PER_BLOCK, VOCAB_SIZE, answers, args, random_prompts

PLUGIN = Path(__file__).parent.parent / "plugin"
WINDOW, DEPTH, HEADS, KV_HEADS, HEAD_DIM = 6, 4, 4, 2, 8
CONFIG = {
    "architectures": ["WindowedToyForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "width": HEADS * HEAD_DIM,
    "depth": DEPTH,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "window": WINDOW,
    "longest": 256,
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PLUGIN)


@pytest.fixture
def folder(installed: None, tmp_path: Path) -> Path:
    """A random model of the family."""
    write_toy(tmp_path)
    return tmp_path


def write_toy(folder: Path) -> None:
    """The weights are those that the family declares; the plug-in must be installed."""
    build = Builder(torch.float32, torch.device("meta"))
    describe(CONFIG).build(build)
    generator = torch.Generator().manual_seed(11)
    weights = [share.weight for share in build.shares.values()]
    tensors = {
        each.name: torch.randn(each.shape, generator=generator) * 0.3 + (1.0 if each.fill == "ones" else 0.0)
        for each in weights
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))


class Reference:
    """The family in plain torch: no cache, no batch, masks instead of windows."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self._weights = load_file(folder / "model.safetensors")

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self._logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    def _logits(self, tokens: list[int]) -> Tensor:
        x = self._weights["tokens.weight"][tokens]
        for index in range(DEPTH):
            x = x + self._attention(self._norm(x, f"{index}.norm1"), index)
            hidden = functional.relu(self._times(self._norm(x, f"{index}.norm2"), f"{index}.up"))
            x = x + self._times(hidden, f"{index}.down")
        return self._times(self._norm(x, "norm"), "head")

    def _attention(self, x: Tensor, index: int) -> Tensor:
        q, k, v = (self._times(x, f"{index}.{name}").view(len(x), -1, HEAD_DIM).transpose(0, 1) for name in "qkv")
        k, v = (each.repeat_interleave(HEADS // KV_HEADS, 0) for each in (k, v))
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
        visible = distance >= 0
        if index % 2 == 0:
            visible &= distance < WINDOW
            q, k = _rotated(q), _rotated(k)
        scores = (q @ k.transpose(1, 2) / math.sqrt(HEAD_DIM)).masked_fill(~visible, -math.inf)
        return self._times((scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1), f"{index}.o")

    def _times(self, x: Tensor, name: str) -> Tensor:
        return x @ self._weights[f"{name}.weight"].T

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * self._weights[f"{name}.weight"]


def _rotated(heads: Tensor) -> Tensor:
    """Rotary positions of base 100 for [num_heads, num_tokens, HEAD_DIM]."""
    frequencies = 100.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turned = torch.polar(torch.ones(()), torch.arange(heads.shape[1])[:, None] * frequencies)
    product = torch.complex(*heads.float().chunk(2, -1)) * turned
    return torch.cat([product.real, product.imag], -1)


class GroupedDriver:
    """One sequence after the other over one runner; blocks before the window are given back at once, and spoilt."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._free = [list(range(pool.num_blocks)) for pool in runner.pools]
        self.num_given_back = 0

    def greedy(self, prompt: list[int], chunks: list[int], num_tokens: int) -> list[int]:
        tables: list[list[int]] = [[] for _ in self._free]
        tokens, start = list(prompt), 0
        while len(tokens) < len(prompt) + num_tokens:
            size = chunks.pop(0) if chunks else len(tokens) - start
            self._make_room(tables, start, start + size)
            is_last = start + size == len(tokens)
            item = BatchItem(tokens[start : start + size], start, tables, int(is_last), GREEDY, prompt)
            tokens += self._runner.launch([item]).results()[0].token_ids
            start += size
        return tokens[len(prompt) :]

    def _make_room(self, tables: list[list[int]], start: int, end: int) -> None:
        for pool, free, table in zip(self._runner.pools, self._free, tables, strict=True):
            window = pool.share.group.spec.window
            while len(table) * TOKENS_PER_BLOCK < end:
                table.append(free.pop())
            first_seen = 0 if window is None else max(0, start + 1 - window)
            for at in range(first_seen // TOKENS_PER_BLOCK):
                if table[at] >= 0:
                    pool.tensor[table[at]] = math.nan
                    table[at] = -1
                    self.num_given_back += 1


def test_a_family_is_found_by_its_architecture(installed: None) -> None:
    assert "WindowedToyForCausalLM" in architectures()
    config = describe(CONFIG)
    assert (config.architecture, config.num_layers, config.max_positions) == ("WindowedToyForCausalLM", DEPTH, 256)
    with pytest.raises(ConfigError, match="n_group: not supported for WindowedToyForCausalLM"):
        describe({**CONFIG, "n_group": 2})


def test_without_the_distribution_the_architecture_is_not_known() -> None:
    with pytest.raises(ConfigError, match=r"allowed: LlamaForCausalLM.* got WindowedToyForCausalLM") as caught:
        describe(CONFIG)
    assert caught.value.param == "architectures"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("windowed_toy:Another", "has no attribute 'Another'"),
        ("not_installed_at_all:Model", "No module named 'not_installed_at_all'"),
        ("windowed_toy:THETA", "windowed_toy:THETA is no ModelConfig"),
    ],
)
def test_an_entry_point_that_leads_nowhere_is_named(
    value: str, text: str, installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "broken", value, "BrokenForCausalLM")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=text) as caught:
        describe({"architectures": ["BrokenForCausalLM"]})
    assert caught.value.param == "architectures"


def test_two_distributions_for_one_architecture_are_named(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "another-toy", "windowed_toy:WindowedToy", "WindowedToyForCausalLM")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="several distributions: another-toy, windowed-toy"):
        describe(CONFIG)


def install(folder: Path, distribution: str, value: str, architecture: str) -> None:
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{architecture} = {value}\n")


def test_each_kind_of_layer_has_a_pool_of_its_own(folder: Path) -> None:
    runner = ModelRunner(args(folder, max_batch_size=2, max_num_tokens=16, max_seq_len=56))
    near, far = CacheSpec("window", KV_HEADS, HEAD_DIM, WINDOW), CacheSpec("full", KV_HEADS, HEAD_DIM)
    assert runner.rank.decoder.caches == [near, far] * 2
    assert [pool.share.group.layers for pool in runner.pools] == [(0, 2), (1, 3)]
    # Two sequences of at most (6 + 16) tokens, in blocks of 4, of which one more is begun; 1200 tokens.
    assert runner.limits.cache_groups == (CacheGroupLimits(2 * 7, WINDOW), CacheGroupLimits(300))
    assert [pool.tensor.shape[:2] for pool in runner.pools] == [(14, 2), (300, 2)]


@pytest.mark.parametrize("chunks", [[40], [1, 3, 13, 23], [8, 1, 31]])
def test_windows_and_full_attention_equal_plain_torch(folder: Path, chunks: list[int]) -> None:
    runner, prompt = ModelRunner(args(folder)), torch.randint(0, VOCAB_SIZE, (40,), generator=seeded(3)).tolist()
    driver = GroupedDriver(runner)
    expected = Reference(folder).greedy(prompt, 20)
    assert driver.greedy(prompt, chunks, 20) == expected
    assert len(set(expected)) > 5, "the model says something"
    assert driver.num_given_back > 8


@pytest.mark.parametrize(
    "layout",
    # Of the last one's first rank: a windowed layer, and none of the others.
    [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2, "pp_partition": (1, 3)}],
    ids=str,
)
def test_an_engine_serves_both_kinds(folder: Path, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes, prefixes reused, blocks that a window has passed given to others."""
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
    cache = KvCacheConfig(max_tokens=160, tokens_per_block=TOKENS_PER_BLOCK)
    runner = ModelRunner(
        args(folder, max_num_tokens=16, max_batch_size=3, kv_cache_config=cache, num_threads=1, **layout)
    )
    prompts = [*random_prompts((5, 40, 23, 17)), random_prompts((40,))[0]]
    expected = [Reference(folder).greedy(prompt, 12) for prompt in prompts]
    try:
        runner.warmup()
        assert not any(pool.tensor.any() for pool in runner.pools)
        for _ in range(2):
            assert answers(Engine(runner, EngineOptions()), prompts, 12, temperature=0.0) == expected
    finally:
        runner.close()


def test_a_prompt_is_served_that_is_longer_than_all_windows_together(folder: Path) -> None:
    """It takes blocks for all of its tokens when it starts, in the windowed group, too."""
    runner = ModelRunner(args(folder, max_batch_size=1, max_num_tokens=16, num_threads=1))
    (prompt,) = random_prompts((100,))
    expected = Reference(folder).greedy(prompt, 4)
    assert answers(Engine(runner, EngineOptions()), [prompt], 4, temperature=0.0) == [expected]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

"""The whole engine on a GPU: transformers' tokens there, and the same ones with overlapped steps and CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import LlmArgs, SchedulerConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.run.step import Step
from pdserve.engine.schedule import prompts
from pdserve.engine.schedule.batch import BatchItem
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from tests.unit.engine_bench import request, run
from tests.unit.test_drafts_model import Prompter, answer, check_equal, texts
from tests.unit.tiny_models import CONFIGS, answers, args, random_prompts, save

pytestmark = pytest.mark.gpu

NUM_NEW_TOKENS = 24
LENGTHS = (1, 3, 17, 40, 40, 64)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def generate(llm_args: LlmArgs, overlap: bool, **sampling: Any) -> list[list[int]]:
    runner = ModelRunner(llm_args)
    runner.warmup()
    engine = Engine(runner, replace(EngineOptions.from_args(llm_args), overlap=overlap))
    return answers(engine, random_prompts(LENGTHS), NUM_NEW_TOKENS, **sampling)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers_on_the_same_gpu(name: str, tmp_path: Path) -> None:
    model = save(name, tmp_path).cuda()
    expected = []
    for prompt in random_prompts(LENGTHS):
        ids = torch.tensor([prompt], device="cuda")
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    settings = args(tmp_path, device="cuda", max_num_tokens=32)
    assert generate(settings, overlap=True, temperature=0.0) == expected


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.2, "top_p": 0.9, "top_k": 40},
        {"temperature": 0.8, "min_tokens": 20, "stop_token_ids": tuple(range(40))},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    ],
    ids=["greedy", "sampled", "stop", "penalized"],
)
def test_overlapping_steps_changes_no_token(sampling: dict[str, Any], graphs: bool, tmp_path: Path) -> None:
    save("llama", tmp_path)
    off = {} if graphs else {"cuda_graph_config": None}
    settings = args(tmp_path, device="cuda", max_num_tokens=32, **off)
    assert generate(settings, overlap=True, **sampling) == generate(settings, overlap=False, **sampling)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_choices_read_a_prompt_that_the_step_before_them_computes(
    graphs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step that reads the blocks is launched while the one that writes them still runs."""
    monkeypatch.setattr(prompts, "WORTH_A_STEP_TOKENS", 8)
    save("llama", tmp_path)
    settings = args(tmp_path, device="cuda", **({} if graphs else {"cuda_graph_config": None}))
    told = []
    for reuse in (False, True):
        runner = ModelRunner(settings)
        runner.warmup()
        engine = Engine(runner, replace(EngineOptions.from_args(settings), enable_block_reuse=reuse))
        for seed in range(6):
            engine.submit(request(str(seed), *random_prompts([60]), seed=seed, temperature=1.2, max_tokens=20))
        client = run(engine)
        engine.check()
        told.append([client.tokens(str(seed)) for seed in range(6)])
        assert (client.end("5").usage.cached_tokens > 0) == reuse
    assert told[0] == told[1]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_drafts_change_neither_tokens_nor_log_probabilities(graphs: bool, tmp_path: Path) -> None:
    save("llama", tmp_path)
    off = {} if graphs else {"cuda_graph_config": None}
    mixed = {"scheduler_config": SchedulerConfig(max_mixed_prefill_tokens=12)}
    runner = ModelRunner(args(tmp_path, device="cuda", **mixed, **off))
    runner.warmup()
    expected, num_steps = answer(runner, None, True)
    chance = random.Random(0)
    said, steps = answer(runner, Prompter(texts(expected), lambda most: chance.randint(0, most)), True)
    check_equal(said, expected)
    assert steps < num_steps


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.2, "top_p": 0.9}], ids=["greedy", "drawn"]
)
def test_captured_steps_of_decodes_and_chunks_change_no_token(
    sampling: dict[str, Any], overlap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("llama", tmp_path)
    kinds: list[str] = []
    pack = ModelRunner._pack

    def packed(runner: ModelRunner, items: Sequence[BatchItem]) -> Step:
        step = pack(runner, items)
        kinds.append(step.kind)
        return step

    monkeypatch.setattr(ModelRunner, "_pack", packed)
    mixed = {"scheduler_config": SchedulerConfig(max_mixed_prefill_tokens=12)}
    captured = generate(args(tmp_path, device="cuda", **mixed), overlap, **sampling)
    assert kinds.count("mixed") > 5
    assert captured == generate(args(tmp_path, device="cuda", cuda_graph_config=None, **mixed), overlap, **sampling)

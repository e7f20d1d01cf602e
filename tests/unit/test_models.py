"""Every family computes what transformers computes, however the scheduler slices the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Sampling, TokenLogprob
from tests.unit.tiny_models import CONFIGS, GREEDY, ROPES, TOKENS_PER_BLOCK, VOCAB_SIZE, Driver, args, save

NUM_NEW_TOKENS = 33


@pytest.fixture(scope="module", params=[*CONFIGS, *ROPES])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelRunner]:
    """transformers' model and ours, from one folder."""
    folder = tmp_path_factory.mktemp("model")
    model = save(request.param, folder, max_shard_size="30KB" if request.param == "llama" else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == (request.param == "llama")
    return model, ModelRunner(args(folder))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = tmp_path_factory.mktemp("model")
    save("llama", folder)
    return ModelRunner(args(folder))


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def distribution(entry: TokenLogprob) -> torch.Tensor:
    tokens, values = zip(*entry.top, strict=True)
    return torch.full((VOCAB_SIZE,), float("nan")).index_put((torch.tensor(tokens),), torch.tensor(values))


@pytest.mark.parametrize("start", [0, 1, 13])
def test_log_probabilities_are_those_of_transformers(pair: tuple[Any, ModelRunner], start: int) -> None:
    model, runner = pair
    prompt = prompt_of(90, seed=1)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    result = Driver(runner).score(prompt, start)
    assert result.prompt_logprobs is not None
    actual = torch.stack([distribution(entry) for entry in [*result.prompt_logprobs, *result.logprobs]])
    torch.testing.assert_close(actual, expected[start:], rtol=1e-4, atol=2e-4)
    assert [entry.token_id for entry in result.prompt_logprobs] == prompt[start + 1 :]
    for entry, row in zip(result.prompt_logprobs, actual, strict=False):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]))


def test_greedy_continuations_with_chunked_prefill_and_mixed_batches(pair: tuple[Any, ModelRunner]) -> None:
    model, runner = pair
    prompts = [prompt_of(length, seed=length) for length in (1, 4, 5, 23, 40)]
    chunks = [[1], [1, 2, 1], [4, 1], [1, 3, 5, 1, 13], [8, 1, 31]]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        expected.append(out[0, len(prompt) :].tolist())
    assert Driver(runner).generate(prompts, chunks, NUM_NEW_TOKENS) == expected
    assert len({token for tokens in expected for token in tokens}) > 10, "the model says something"


def test_a_prefix_computed_by_another_sequence_can_be_shared(runner: ModelRunner) -> None:
    driver = Driver(runner)
    prompt, other = prompt_of(3 * TOKENS_PER_BLOCK, 5), prompt_of(6, 6)
    alone = driver.generate([prompt + other], [[18]], 5)[0]
    shared = driver.blocks(len(prompt))
    runner.launch([BatchItem(prompt, 0, [shared], 0, GREEDY)]).results()
    item = BatchItem(other, len(prompt), [[*shared, *driver.blocks(12)]], 1, GREEDY, prompt + other)
    assert runner.launch([item]).results()[0].token_ids == (alone[0],)


def test_results_stand_in_the_order_of_the_items(runner: ModelRunner) -> None:
    """Longest last, decodes between prefills: none of this is the order in which the runner computes."""
    prompts = [prompt_of(length, length) for length in (7, 2, 30, 12)]
    driver = Driver(runner)
    alone = [driver.generate([prompt], [[len(prompt)]], 2)[0] for prompt in prompts]
    blocks = [driver.blocks(40) for _ in prompts]
    for index in (1, 3):
        runner.launch([BatchItem(prompts[index], 0, [blocks[index]], 0, GREEDY)]).results()
    items = [
        BatchItem(prompts[0], 0, [blocks[0]], 1, GREEDY, prompts[0]),
        BatchItem([alone[1][0]], 2, [blocks[1]], 1, GREEDY, prompts[1], alone[1][:1]),
        BatchItem(prompts[2], 0, [blocks[2]], 0, GREEDY, prompts[2]),
        BatchItem([alone[3][0]], 12, [blocks[3]], 1, GREEDY, prompts[3], alone[3][:1]),
    ]
    results = [result.token_ids for result in runner.launch(items).results()]
    assert results == [(alone[0][0],), (alone[1][1],), (), (alone[3][1],)]


def test_samples_do_not_depend_on_the_batch(runner: ModelRunner) -> None:
    """The weak form, on logits that differ in the last bits: none of 4 x 12 draws falls on a boundary."""
    prompts = [prompt_of(length, length) for length in (3, 9, 17, 5)]
    samplings = [Sampling(seed=seed, max_tokens=12, temperature=1.0, top_p=0.9) for seed in range(4)]
    driver = Driver(runner)
    together = driver.generate(prompts, [[3], [2, 7], [17], [1, 4]], 12, samplings)
    alone = [
        Driver(runner, seed=9).generate([prompt], [[len(prompt)]], 12, [sampling])[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    assert together == alone


def test_prompt_logprobs_of_a_chunk_end_where_the_prompt_ends(runner: ModelRunner) -> None:
    prompt = prompt_of(10, 3)
    driver = Driver(runner)
    whole = driver.score(prompt).prompt_logprobs
    assert whole is not None
    assert len(whole) == 9
    sampling = Sampling(seed=0, max_tokens=1, prompt_logprobs=0)
    chunk = BatchItem(
        prompt[:4], 0, [driver.blocks(4)], 0, sampling, next_prompt_token=prompt[4], want_prompt_logprobs=True
    )
    bystander = BatchItem(prompt[:7], 0, [driver.blocks(7)], 1, GREEDY, prompt[:7])
    results = runner.launch([bystander, chunk]).results()
    assert results[0].prompt_logprobs is None
    scored = results[1].prompt_logprobs
    assert scored is not None
    assert [entry.token_id for entry in scored] == prompt[1:5]
    assert [entry.top for entry in scored] == [[]] * 4
    assert [entry.logprob for entry in scored] == pytest.approx([entry.logprob for entry in whole[:4]], abs=1e-4)


def test_a_prompt_of_several_scored_chunks(runner: ModelRunner) -> None:
    """The runner scores 256 rows at a time."""
    prompt = prompt_of(301, 8)
    driver = Driver(runner)
    sampling = Sampling(seed=0, max_tokens=1, prompt_logprobs=1)
    item = BatchItem(
        prompt[:300],
        0,
        [driver.blocks(300)],
        0,
        sampling,
        next_prompt_token=prompt[300],
        want_prompt_logprobs=True,
    )
    scored = runner.launch([item]).results()[0].prompt_logprobs
    parts = [driver.score(prompt, start).prompt_logprobs for start in (0, 260)]
    assert scored is not None
    assert parts[0] is not None
    assert parts[1] is not None
    assert [entry.token_id for entry in scored] == prompt[1:]
    assert [entry.logprob for entry in scored[260:]] == pytest.approx([e.logprob for e in parts[1]], abs=1e-3)
    assert [entry.logprob for entry in scored] == pytest.approx([e.logprob for e in parts[0]], abs=1e-3)


def test_log_probabilities_are_only_for_those_who_ask(runner: ModelRunner) -> None:
    prompt = prompt_of(5, 5)
    driver = Driver(runner)
    asking = Sampling(seed=0, max_tokens=1, temperature=0.0, logprobs=2)
    items = [
        BatchItem(prompt, 0, [driver.blocks(5)], 1, sampling, prompt)
        for sampling in (GREEDY, asking, Sampling(seed=0, max_tokens=1, temperature=0.0, logprobs=0))
    ]
    none, two, zero = runner.launch(items).results()
    assert not none.logprobs
    (with_top,), (bare,) = two.logprobs, zero.logprobs
    assert (len(with_top.top), len(bare.top)) == (2, 0)
    assert with_top.top[0] == (*two.token_ids, with_top.logprob)


def test_warmup_leaves_the_pool_clean(tmp_path: Path) -> None:
    save("qwen2-mqa-tied", tmp_path)
    runner = ModelRunner(args(tmp_path))
    runner.warmup()
    assert not runner.pool.tensor.any()


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    save("qwen3", tmp_path)
    prompt = prompt_of(40, 2)
    exact, rounded = (
        Driver(ModelRunner(args(tmp_path, dtype=dtype))).score(prompt).prompt_logprobs
        for dtype in ("float32", "bfloat16")
    )
    assert exact is not None
    assert rounded is not None
    errors = [abs(a.logprob - b.logprob) for a, b in zip(exact, rounded, strict=True)]
    assert 0 < sum(errors) / len(errors) < 0.1

"""A prompt computed by one engine and continued by another says what transformers says, whatever the family."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pdserve.config import CacheTransceiverConfig, KvCacheConfig
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.handoff import HandoffEvent
from pdserve.protocol import GenerateRequest, Key, KvAddress, Phase, Sampling
from pdserve.roles.kv_transfer import TransceiverSpec, attach_transceiver
from tests.transfer.networks import SIMPLE
from tests.unit.test_model_plugins import PLUGIN, Reference, write_toy
from tests.unit.tiny_models import args, random_prompts, save

NUM_TOKENS = 16
TIMEOUT_S = 60.0


@contextmanager
def worker(folder: Path, role: Phase, wake: threading.Event, **changes: Any) -> Iterator[tuple[Engine, KvAddress]]:
    """An engine of that role in this process, and where its transceiver listens."""
    config = CacheTransceiverConfig(backend=SIMPLE, max_tokens_in_buffer=16)
    settings = args(folder, num_threads=1, max_num_tokens=16, cache_transceiver_config=config, **changes)
    runner = ModelRunner(settings)

    def post(event: HandoffEvent) -> None:
        engine.post(event)
        wake.set()

    spec = TransceiverSpec(role, f"{role}-0", "127.0.0.1", "127.0.0.1")
    joined = attach_transceiver(spec, settings, runner.rank, runner.pools, runner.executor, None, post, print)
    engine = Engine(
        runner, EngineOptions.from_args(settings), exporter=joined.exporter, importer=joined.importer, wake=wake.set
    )
    try:
        yield engine, joined.transceiver.start()
    finally:
        joined.transceiver.close()
        runner.close()


def request(number: int, prompt: list[int], phase: Phase, peer: KvAddress) -> GenerateRequest:
    sampling = Sampling(seed=0, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    return GenerateRequest(
        key=Key(str(number), 0),
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=sampling,
        timeout_s=TIMEOUT_S,
        phase=phase,
        peer=peer,
    )


def hand_over(folder: Path, prompts: list[list[int]], **changes: Any) -> list[list[int]]:
    """What both engines say of each prompt. Blocks have another size on the other side, and chunks 16 tokens."""
    wake, wide = threading.Event(), KvCacheConfig(max_tokens=1200, tokens_per_block=8)
    with (
        worker(folder, "context", wake, **changes) as (context, sender),
        worker(folder, "generation", wake, kv_cache_config=wide, **changes) as (generation, receiver),
    ):
        for number, prompt in enumerate(prompts):
            context.submit(request(number, prompt, "context", receiver))
            generation.submit(request(number, prompt, "generation", sender))
        said: dict[Key, list[int]] = {}
        reasons = set()
        while not (context.is_idle and generation.is_idle):
            wake.clear()
            for engine in (context, generation):
                frame = engine.step()
                for delta in frame.deltas:
                    said.setdefault(delta.key, []).extend(delta.token_ids)
                reasons |= {finished.reason for finished in frame.finished}
            if not (context.has_work or generation.has_work):
                assert wake.wait(TIMEOUT_S) or context.is_idle
        for engine in (context, generation):
            engine.check()
            counts = engine.stats().blocks
            assert counts.used == counts.reserved == 0
    assert reasons == {"handoff", "length"}
    return [said[Key(str(number), 0)] for number in range(len(prompts))]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_handoff_changes_no_token(family: str, tmp_path: Path) -> None:
    model = save(family, tmp_path)
    prompts = random_prompts((3, 40, 17))
    for prompt, said in zip(prompts, hand_over(tmp_path, prompts), strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0)
        assert said == out[0, len(prompt) :].tolist()


def test_a_family_of_another_distribution_hands_both_of_its_cache_groups_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other layer attends over a window of 6 tokens; of these only the last window's blocks travel."""
    monkeypatch.syspath_prepend(PLUGIN)
    write_toy(tmp_path)
    reference, prompts = Reference(tmp_path), random_prompts((3, 40, 17, 90))
    assert hand_over(tmp_path, prompts) == [reference.greedy(prompt, NUM_TOKENS) for prompt in prompts]

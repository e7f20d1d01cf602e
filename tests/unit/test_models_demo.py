"""The demo model says what transformers makes of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pdserve.config import KvCacheConfig, LlmArgs
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.model_store import DEMO_MODEL, resolve_model
from pdserve.protocol import Sampling
from tests.unit.tiny_models import Driver

NUM_NEW_TOKENS = 24
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' into French.",
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEMO_MODEL)


def test_greedy_answers_equal_those_of_transformers(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    cache = KvCacheConfig(max_tokens=2048)
    runner = ModelRunner(LlmArgs(model=DEMO_MODEL, dtype="float32", device="cpu", kv_cache_config=cache))
    chunks = [[1, 30], [], [7, 7, 7], [20, 1], [10]]
    # As min_new_tokens does for transformers: an answer that ends early is continued.
    sampling = Sampling(seed=0, max_tokens=NUM_NEW_TOKENS, min_tokens=NUM_NEW_TOKENS, temperature=0.0)
    said = Driver(runner).generate(prompts, chunks, NUM_NEW_TOKENS, [sampling] * len(prompts))
    for prompt, tokens in zip(prompts, said, strict=True):
        assert len(tokens) == NUM_NEW_TOKENS
        # One step says of every token whether it is the likeliest, as generating them one by one would.
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
            logits[:, model.generation_config.eos_token_id] = float("-inf")
        assert tokens == logits.argmax(-1).tolist()
    assert "Paris" in tokenizer.decode(said[0])

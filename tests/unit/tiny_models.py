"""Small random models of every family, saved by transformers, and a driver that feeds a runner as a scheduler would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from pdserve.config import KvCacheConfig, LlmArgs
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.batch import BatchItem, BatchResult
from pdserve.engine.schedule.engine import Engine
from pdserve.protocol import GenerateRequest, Key, Sampling

VOCAB_SIZE = 131
TOKENS_PER_BLOCK = 4
GREEDY = Sampling(seed=0, max_tokens=1, temperature=0.0)

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


def _llama(**changes: Any) -> PreTrainedConfig:
    return LlamaConfig(**{**_SMALL, **changes})


def _rope(kind: str, **facts: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 500.0, **facts}


CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": _llama(),
    "llama-mha-biases-tied": _llama(
        num_attention_heads=4,
        num_key_value_heads=4,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    ),
    "llama3-rope": _llama(
        head_dim=16,
        rope_parameters=_rope(
            "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
        ),
    ),
    "llama-linear-rope": _llama(max_position_embeddings=64, rope_parameters=_rope("linear", factor=4.0)),
    "llama-yarn-rope": _llama(
        head_dim=32, rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64)
    ),
    "mistral-own-head-dim": MistralConfig(**{**_SMALL, "hidden_size": 40, "head_dim": 20, "sliding_window": None}),
    "qwen2-mqa-tied": Qwen2Config(**{**_SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": Qwen3Config(**{**_SMALL, "head_dim": 12}),
    "qwen3-biases": Qwen3Config(**{**_SMALL, "head_dim": 24, "attention_bias": True, "num_key_value_heads": 3}),
    "gpt2": GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=48, n_layer=3, n_head=6, n_positions=256, bos_token_id=None, eos_token_id=None
    ),
}

ROPES: dict[str, PreTrainedConfig] = {
    "llama-dynamic-rope": _llama(rope_parameters=_rope("dynamic", factor=4.0)),
    "qwen2-yarn-beyond-its-table": Qwen2Config(
        **{
            **_SMALL,
            "max_position_embeddings": 32,
            "rope_parameters": _rope(
                "yarn", factor=8.0, original_max_position_embeddings=32, attention_factor=1.25, beta_fast=16.0
            ),
        }
    ),
}
"""Further kinds of rope, in which nothing else differs."""


def save(name: str, folder: Path, max_shard_size: str = "5GB") -> Any:
    """The named model with noise in every parameter, norms and biases included, saved to `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**CONFIGS, **ROPES}[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            is_scale = parameter.dim() == 1 and not parameter_name.endswith("bias")
            # Positions strong enough that GPT-2 says more than one thing.
            parameter.normal_(1.0 if is_scale else 0.0, 2.5 if "wpe" in parameter_name else 0.25)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def args(folder: Path, **changes: Any) -> LlmArgs:
    cache = KvCacheConfig(max_tokens=1200, tokens_per_block=TOKENS_PER_BLOCK)
    settings = {"dtype": "float32", "device": "cpu", "kv_cache_config": cache, "max_batch_size": 16, **changes}
    return LlmArgs(model=str(folder), **settings)


class Driver:
    """Sequences over one runner, with blocks scattered over the pool."""

    def __init__(self, runner: ModelRunner, seed: int = 0) -> None:
        self._runner = runner
        order = torch.randperm(runner.pool.num_blocks, generator=torch.Generator().manual_seed(seed))
        self._free = order.tolist()

    def blocks(self, num_tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-num_tokens // self._runner.pool.tokens_per_block))]

    def generate(
        self, prompts: Sequence[Sequence[int]], chunks: Sequence[Sequence[int]], num_tokens: int,
        samplings: Sequence[Sampling] | None = None,
    ) -> list[list[int]]:  # fmt: skip
        """`num_tokens` tokens after each prompt, which is computed in `chunks`, all sequences in one batch.

        A prompt with fewer chunks decodes while another is still being prefilled.
        """
        samplings = samplings or [GREEDY] * len(prompts)
        blocks = [self.blocks(len(prompt) + num_tokens) for prompt in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        waiting = [list(sizes) for sizes in chunks]
        computed = [0] * len(prompts)
        while True:
            items, owners = [], []
            for index, prompt in enumerate(prompts):
                if len(outputs[index]) == num_tokens:
                    continue
                history = [*prompt, *outputs[index]]
                start = computed[index]
                size = waiting[index].pop(0) if waiting[index] else len(history) - start
                computed[index] += size
                items.append(
                    BatchItem(
                        token_ids=history[start : start + size],
                        start=start,
                        tables=[blocks[index]],
                        num_sampled=int(start + size == len(history)),
                        sampling=samplings[index],
                        prompt_ids=prompt,
                        output_ids=tuple(outputs[index]),
                    )
                )
                owners.append(index)
            if not items:
                return outputs
            for index, item, result in zip(owners, items, self._runner.launch(items).results(), strict=True):
                assert len(result.token_ids) == item.num_sampled
                outputs[index].extend(result.token_ids)

    def score(self, prompt: Sequence[int], start: int = 0) -> BatchResult:
        """Compute `prompt` up to `start`, then the rest with every log-probability of the vocabulary."""
        blocks = self.blocks(len(prompt))
        sampling = Sampling(seed=0, max_tokens=1, temperature=0.0, logprobs=VOCAB_SIZE, prompt_logprobs=VOCAB_SIZE)
        if start:
            self._runner.launch([BatchItem(prompt[:start], 0, [blocks], 0, sampling)]).results()
        item = BatchItem(prompt[start:], start, [blocks], 1, sampling, prompt_ids=prompt, want_prompt_logprobs=True)
        return self._runner.launch([item]).results()[0]


def random_prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def answers(engine: Engine, prompts: Sequence[list[int]], max_tokens: int, **sampling: Any) -> list[list[int]]:
    """Tokens of all prompts, which arrive one a step so that prefill and decode mix; the engine is idle afterwards."""
    asked = [
        GenerateRequest(
            key=Key(str(number), 0),
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=Sampling(seed=number, max_tokens=max_tokens, ignore_eos=True, **sampling),
            timeout_s=60,
            phase="both",
        )
        for number, prompt in enumerate(prompts)
    ]
    tokens: dict[Key, list[int]] = {request.key: [] for request in asked}
    waiting = list(asked)
    while waiting or engine.has_work:
        if waiting:
            engine.submit(waiting.pop(0))
        for delta in engine.step().deltas:
            tokens[delta.key] += delta.token_ids
    engine.check()
    assert engine.is_idle
    return [tokens[request.key] for request in asked]

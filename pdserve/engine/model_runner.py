"""Runs steps: a batch of items in, tokens and log-probabilities out. The real `pdserve.engine.batch.Runner`.

Owns the model's parameters, the KV pool and the device they live on, for the life of the engine; keeps nothing of a
request between steps. A step is enqueued whole and waited for once, when its results are on their way to the host.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdserve.config import CudaGraphConfig, LlmArgs
from pdserve.engine import weights
from pdserve.engine.batch import BatchItem, BatchResult
from pdserve.engine.decode_graphs import DecodeGraphs, capture_sizes
from pdserve.engine.kv_pool import KvPool
from pdserve.engine.layers.step_input import StepInput, build, upload
from pdserve.engine.model_config import ModelConfig
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.models.parameters import allocate
from pdserve.engine.resources import (
    activation_bytes,
    choose_attention,
    choose_device,
    choose_dtype,
    choose_max_seq_len,
)
from pdserve.engine.sampler import Logprobs, Sampler, SampleRequest, logprobs
from pdserve.errors import ConfigError
from pdserve.model_store import load_generation_defaults, read_config, resolve_model
from pdserve.protocol import EngineLimits, Sampling, TokenLogprob

log = logging.getLogger(__name__)

# Rows whose logits exist at one time while a prompt is scored: a whole prompt's could outgrow the model.
_SCORED_ROWS = 256


@dataclass(frozen=True, slots=True)
class _Scored:
    """Log-probabilities of the items `indices`: `num_rows[i]` consecutive rows of `chunks` belong to `indices[i]`."""

    indices: list[int]
    num_rows: list[int]
    num_top: list[int]
    chunks: list[Logprobs]

    def entries(self) -> dict[int, list[TokenLogprob]]:
        """By item; the chunks must be on the host."""
        tops = [top for top, rows in zip(self.num_top, self.num_rows, strict=True) for _ in range(rows)]
        remaining = iter(tops)
        flat = (entry for chunk in self.chunks for entry in chunk.entries(list(islice(remaining, len(chunk.ids)))))
        return {index: list(islice(flat, rows)) for index, rows in zip(self.indices, self.num_rows, strict=True)}


# Scores of prompts, indices of the items that sample, their tokens, and the scores of those tokens.
_Launched = tuple[_Scored, list[int], Tensor, _Scored]


class ModelRunner:
    """A loaded model and its KV pool.

    Args:
        args: `model` is resolved, and converted if need be.
        device: overrides `args.device`, for a rank that was given one.
        decodes: whether decode steps will be asked for; without, none are captured as CUDA graphs.

    Raises:
        ConfigError: the model, its files or the arguments can't be served; `param` names the key.
    """

    def __init__(self, args: LlmArgs, *, device: torch.device | None = None, decodes: bool = True) -> None:
        self.device = device or choose_device(args)
        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        folder = resolve_model(args.model)
        self.config = ModelConfig.from_hf(read_config(folder))
        self.dtype = choose_dtype(args, self.config, self.device)
        max_seq_len = choose_max_seq_len(args, self.config)
        eos_token_ids = load_generation_defaults(folder).eos_token_ids
        self._sampler = Sampler(eos_token_ids)
        self._decoder = self._load(args, folder)
        reserve_bytes = activation_bytes(args, self.config, self.dtype)
        self.pool = KvPool.allocate(self.config, args.kv_cache_config, self.dtype, self.device, reserve_bytes)
        self.limits = EngineLimits(
            max_seq_len=max_seq_len,
            max_batch_size=args.max_batch_size,
            max_num_tokens=args.max_num_tokens,
            vocab_size=self.config.vocab_size,
            num_blocks=self.pool.num_blocks,
            tokens_per_block=self.pool.tokens_per_block,
            eos_token_ids=eos_token_ids,
        )
        self._graph_config = args.cuda_graph_config if decodes and self.device.type == "cuda" else None
        self._graphs: DecodeGraphs | None = None
        log.info("%s: %s on %s, %d KV blocks", args.model, self.dtype, self.device, self.pool.num_blocks)

    def _load(self, args: LlmArgs, folder: Path) -> Decoder:
        attention = choose_attention(args, self.device)
        try:
            parameters = allocate(self.config, self.dtype, self.device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(f"model: the weights do not fit on {self.device}: {error}", "model") from None
        if args.load_format == "DUMMY":
            weights.fill_randomly(parameters)
        else:
            weights.load(folder, self.config, parameters)
        return Decoder(self.config, parameters, attention)

    def warmup(self) -> None:
        """Run a prefill and a decode, so that what is compiled or loaded lazily is ready.

        Writes to block 0 and clears it again: call it before the pool is in use.
        """
        sampling = Sampling(seed=0, max_tokens=2, temperature=1.0, top_p=0.5, top_k=2)
        prompt = [0] * min(2, self.limits.max_num_tokens, self.pool.tokens_per_block)
        for token_ids, start in ((prompt, 0), (prompt[-1:], len(prompt) - 1)):
            self.execute([BatchItem(token_ids, start, [0], sample=True, sampling=sampling, prompt_ids=prompt)])
        self.pool.tensor[0].zero_()
        with torch.inference_mode():
            self._decoder.prepare(self.pool.tensor, min(self.limits.max_num_tokens, self.limits.max_seq_len))
        if self._graph_config is not None:
            self._graphs = self._capture(self._graph_config)

    @torch.inference_mode()
    def _capture(self, config: CudaGraphConfig) -> DecodeGraphs | None:
        sizes = capture_sizes(config, self.limits.max_batch_size)
        if not sizes:
            return None
        max_blocks = min(-(-self.limits.max_seq_len // self.pool.tokens_per_block), self.pool.num_blocks)
        return DecodeGraphs(self._decoder, self.pool.tensor, sizes, max_blocks, config.enable_padding)

    @torch.inference_mode()
    def execute(self, items: Sequence[BatchItem]) -> list[BatchResult]:
        """See `Runner.execute`; an error of the device is torch's."""
        if not items:
            return []
        prompts, sampled, tokens, outputs = self._replay(items) or self._run(items)
        host_tokens = self._fetch(tokens)
        prompts, outputs = self._fetch_scores(prompts), self._fetch_scores(outputs)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        token_ids = dict(zip(sampled, host_tokens.tolist(), strict=True))
        prompt_entries, output_entries = prompts.entries(), outputs.entries()
        return [
            BatchResult(
                token_id=token_ids.get(index),
                logprob=output_entries[index][0] if index in output_entries else None,
                prompt_logprobs=prompt_entries.get(index),
            )
            for index in range(len(items))
        ]

    def _run(self, items: Sequence[BatchItem]) -> _Launched:
        """Launch a step of any kind."""
        step = build(items, self.pool.tokens_per_block, self.device)
        hidden = self._decoder.forward(step, self.pool.tensor)
        return self._score_prompts(items, step, hidden), *self._sample(items, step, hidden)

    def _replay(self, items: Sequence[BatchItem]) -> _Launched | None:
        """Launch a step of decodes as a CUDA graph; None if there is none for it."""
        size = None if self._graphs is None else self._graphs.size_for(items)
        if self._graphs is None or size is None:
            return None
        logits, greedy = self._graphs.replay(size, items)
        indices = list(range(len(items)))
        return _Scored([], [], [], []), indices, *self._pick(items, indices, logits, greedy)

    def _sample(self, items: Sequence[BatchItem], step: StepInput, hidden: Tensor) -> tuple[list[int], Tensor, _Scored]:
        """Draw for every item that asks: their indices, their tokens, and the log-probabilities some of them want."""
        rows = [(index, end - 1) for index, end in zip(step.order, step.ends, strict=True) if items[index].sample]
        indices = [index for index, _ in rows]
        if not rows:
            return [], hidden.new_empty(0, dtype=torch.int64), _Scored([], [], [], [])
        logits = self._decoder.logits(hidden.index_select(0, self._index([row for _, row in rows])))
        return indices, *self._pick(items, indices, logits)

    def _pick(
        self, items: Sequence[BatchItem], indices: list[int], logits: Tensor, greedy: Tensor | None = None
    ) -> tuple[Tensor, _Scored]:
        """Tokens of the items `indices`, whose `logits` are given, and the log-probabilities some of them want.

        `greedy` is the logits' argmax, where that is known already.
        """
        requests = [SampleRequest(items[i].sampling, items[i].prompt_ids, items[i].output_ids) for i in indices]
        if greedy is not None and all(request.is_argmax for request in requests):
            tokens = greedy
        else:
            tokens = self._sampler.sample(logits, requests)
        wanted = [at for at, index in enumerate(indices) if items[index].sampling.logprobs is not None]
        if not wanted:
            return tokens, _Scored([], [], [], [])
        num_top = [requests[at].sampling.logprobs or 0 for at in wanted]
        at = self._index(wanted)
        scored = logprobs(logits.index_select(0, at), tokens.index_select(0, at), max(num_top))
        return tokens, _Scored([indices[at] for at in wanted], [1] * len(wanted), num_top, [scored])

    def _score_prompts(self, items: Sequence[BatchItem], step: StepInput, hidden: Tensor) -> _Scored:
        """Log-probabilities of the prompt tokens that follow the step's, for the items that want them."""
        scored = _Scored([], [], [], [])
        for index, end in zip(step.order, step.ends, strict=True):
            item = items[index]
            if not item.want_prompt_logprobs:
                continue
            targets = list(item.token_ids[1:])
            if item.next_prompt_token is not None:
                targets.append(item.next_prompt_token)
            num_top, start = item.sampling.prompt_logprobs or 0, end - len(item.token_ids)
            scored.indices.append(index)
            scored.num_rows.append(len(targets))
            scored.num_top.append(num_top)
            for at in range(0, len(targets), _SCORED_ROWS):
                chunk = self._index(targets[at : at + _SCORED_ROWS])
                rows = hidden[start + at : start + at + len(chunk)]
                scored.chunks.append(logprobs(self._decoder.logits(rows), chunk, num_top))
        return scored

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(np.array(values, np.int64), self.device)

    def _fetch(self, tensor: Tensor) -> Tensor:
        """`tensor` on the host, once the stream is synchronised; on a CUDA device the copy only starts here."""
        return tensor.to("cpu", non_blocking=True)

    def _fetch_scores(self, scored: _Scored) -> _Scored:
        return _Scored(scored.indices, scored.num_rows, scored.num_top, [c.map(self._fetch) for c in scored.chunks])

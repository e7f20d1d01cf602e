"""Runs steps: a batch of items in, tokens and log-probabilities out. The real `pdserve.engine.batch.Runner`.

Owns the model's parameters, the KV pool and the device they live on, for the life of the engine; keeps nothing of a
request between steps. A step is packed on the host, enqueued whole, and waited for only when its results are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pdserve.config import CudaGraphConfig, LlmArgs
from pdserve.engine import weights
from pdserve.engine.batch import BatchItem
from pdserve.engine.decode_graphs import capture_sizes
from pdserve.engine.host_step import GraphPacker, GraphStep, HostStep, pack_eager, prompt_targets
from pdserve.engine.kv_pool import KvPool
from pdserve.engine.layers.step_input import upload
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
from pdserve.engine.sampler import Sampler, SampleRequest, logprobs
from pdserve.engine.step_executor import StepExecutor, StepOutput
from pdserve.engine.step_results import NOTHING_SCORED, DeviceStep, Scored
from pdserve.errors import ConfigError
from pdserve.model_store import load_generation_defaults, read_config, resolve_model
from pdserve.protocol import EngineLimits, Sampling

log = logging.getLogger(__name__)


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
        self.is_asynchronous = self.device.type == "cuda"
        self._executor = StepExecutor(self._decoder, self.pool.tensor, args.max_batch_size)
        self._graph_config = args.cuda_graph_config if decodes and self.device.type == "cuda" else None
        self._graph_packer: GraphPacker | None = None
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
            item = BatchItem(token_ids, start, [0], sample=True, sampling=sampling, prompt_ids=prompt)
            self.launch([item]).results()
        self.pool.tensor[0].zero_()
        with torch.inference_mode():
            self._decoder.prepare(self.pool.tensor, min(self.limits.max_num_tokens, self.limits.max_seq_len))
            if self._graph_config is not None:
                self._capture(self._graph_config)

    def _capture(self, config: CudaGraphConfig) -> None:
        sizes = capture_sizes(config, self.limits.max_batch_size)
        if sizes:
            width = self.limits.tokens_per_block
            max_blocks = min(-(-self.limits.max_seq_len // width), self.limits.num_blocks)
            self._executor.capture(sizes, max_blocks)
            self._graph_packer = GraphPacker(sizes, width, max_blocks, config.enable_padding)

    @torch.inference_mode()
    def launch(self, items: Sequence[BatchItem]) -> DeviceStep:
        """See `Runner.launch`; an error of the device is torch's."""
        try:
            return self._launch(items)
        except Exception:
            if self._graph_packer is not None:
                self._graph_packer.forget()
            raise

    def _launch(self, items: Sequence[BatchItem]) -> DeviceStep:
        step = self._pack(items)
        output = self._executor.run(step)
        prompts = self._score_prompts(items, step, output)
        tokens, outputs = self._pick(items, step.sampled_items, output)
        self._executor.keep(tokens)
        return DeviceStep(len(items), step.sampled_items, tokens, prompts, outputs)

    def _pack(self, items: Sequence[BatchItem]) -> HostStep:
        step = None if self._graph_packer is None else self._graph_packer.pack(items)
        return step or pack_eager(items, self.limits.tokens_per_block)

    def _pick(self, items: Sequence[BatchItem], indices: list[int], output: StepOutput) -> tuple[Tensor, Scored]:
        """Tokens of the items `indices`, whose logits `output` has, and the log-probabilities some of them want."""
        if not indices:
            return self._index([]), NOTHING_SCORED
        logits, greedy = output.logits, output.greedy
        requests = [_sample_request(items[index]) for index in indices]
        if greedy is not None and all(request.is_argmax for request in requests):
            tokens = greedy
        else:
            tokens = self._sampler.sample(logits, requests)
        wanted = [at for at, index in enumerate(indices) if items[index].sampling.logprobs is not None]
        if not wanted:
            return tokens, NOTHING_SCORED
        num_top = [requests[at].sampling.logprobs or 0 for at in wanted]
        at = self._index(wanted)
        scored = logprobs(logits.index_select(0, at), tokens.index_select(0, at), max(num_top))
        return tokens, Scored([indices[at] for at in wanted], [1] * len(wanted), num_top, [scored])

    def _score_prompts(self, items: Sequence[BatchItem], step: HostStep, output: StepOutput) -> Scored:
        """Log-probabilities of the prompt tokens that follow the step's, for the items that want them."""
        if isinstance(step, GraphStep) or not step.scored:
            return NOTHING_SCORED
        scored = Scored([], [], [], [])
        pieces = self._executor.score(step, output)
        for index in step.order:
            item = items[index]
            if not item.want_prompt_logprobs:
                continue
            targets, num_top = prompt_targets(item), item.sampling.prompt_logprobs or 0
            scored.indices.append(index)
            scored.num_rows.append(len(targets))
            scored.num_top.append(num_top)
            while targets:
                logits = next(pieces)
                scored.chunks.append(logprobs(logits, self._index(targets[: len(logits)]), num_top))
                del targets[: len(logits)]
        return scored

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(np.array(values, np.int64), self.device)


def _sample_request(item: BatchItem) -> SampleRequest:
    return SampleRequest(item.sampling, item.prompt_ids, item.output_ids, num_pending=int(item.previous is not None))

"""Runs steps: a batch of items in, tokens and log-probabilities out. The real `pdserve.engine.schedule.batch.Runner`.

Owns the loaded model and, where it is spread over several ranks, the others; keeps nothing of a request between steps.
A step is packed on the host, enqueued whole, and waited for only when its results are asked for.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pd_kernels.paged_attention import gathered_tokens
from pdserve.config import CudaGraphConfig, LlmArgs
from pdserve.engine.layers.step_input import upload
from pdserve.engine.models.config import ModelConfig
from pdserve.engine.models.registry import describe
from pdserve.engine.parallel.group import SINGLE_RANK, Group, RankGroup
from pdserve.engine.parallel.mapping import Mapping
from pdserve.engine.run.decode_graphs import capture_sizes
from pdserve.engine.run.graph_packer import GraphPacker
from pdserve.engine.run.host_step import (
    ChunkLimits,
    EagerStep,
    HostStep,
    pack_eager,
    prompt_targets,
    without_cache_writes,
)
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.ranks.lockstep import LeadingExecutor
from pdserve.engine.run.ranks.ranks import BARE_FOLLOWER, FollowerProgram, Followers
from pdserve.engine.run.resources import choose_device, choose_graphs, choose_max_seq_len
from pdserve.engine.run.sampler import Sampler, SampleRequest, logprobs
from pdserve.engine.run.step_executor import StepExecutor, StepOutput
from pdserve.engine.run.step_results import NOTHING_SCORED, DeviceStep, Scored
from pdserve.engine.schedule.batch import BatchItem, BlockCopy, LaunchedStep
from pdserve.errors import PdserveError
from pdserve.handoff import KvExporter
from pdserve.model_store import load_generation_defaults, read_config, resolve_model
from pdserve.protocol import CacheGroupLimits, EngineLimits, Sampling

log = logging.getLogger(__name__)

# What a captured step has room for beside decodes: prompts, new tokens of theirs, and all tokens they have by then.
# Beyond that a step is launched operation by operation, which takes the host less time than it takes the GPU.
_MAX_CAPTURED_CHUNKS = 4
_MAX_CAPTURED_CHUNK_TOKENS = 1024
_MAX_CAPTURED_CONTEXT = 16384


def _ignore(_: PdserveError) -> None:
    pass


class ModelRunner:
    """A loaded model and its KV pool; of a model over several ranks, rank 0 and what keeps the others in step.

    Args:
        args: `model` is resolved, and converted if need be.
        decodes: whether decode steps will be asked for; without, none are captured as CUDA graphs.
        followers: what other ranks run.
        on_rank_lost: called at once, from any thread, when another rank has ended: the host must end. Where it returns,
            what waits for that rank fails, and every later step raises `RunnerLost`.

    Raises:
        ConfigError: the model, its files or the arguments can't be served; `param` names the key.
        RunnerLost: another rank could not be started.
    """

    def __init__(
        self,
        args: LlmArgs,
        *,
        decodes: bool = True,
        followers: FollowerProgram = BARE_FOLLOWER,
        on_rank_lost: Callable[[PdserveError], None] = _ignore,
    ) -> None:
        if args.num_threads is not None:
            torch.set_num_threads(args.num_threads)
        folder = resolve_model(args.model)
        max_seq_len = choose_max_seq_len(args, _check(args, folder))
        eos_token_ids = load_generation_defaults(folder).eos_token_ids
        self._sampler = Sampler(eos_token_ids)
        self._on_rank_lost = on_rank_lost
        self._group: Group = SINGLE_RANK
        self._end = contextlib.ExitStack()
        self._followers = Followers(args, folder, followers, self._lose)
        if self._followers.num_ranks > 1:
            self._end.callback(lambda: self._group.abort())
            self._end.callback(self._followers.close)
            # Ranks that are left at exit would wait for each other.
            atexit.register(self.close)
        with self._started():
            self.rank = self._load(args, folder)
        self.device, self.config, self.dtype = self.rank.device, self.rank.config, self.rank.dtype
        self.limits = EngineLimits(
            max_seq_len=max_seq_len,
            max_batch_size=args.max_batch_size,
            max_num_tokens=args.max_num_tokens,
            vocab_size=self.config.vocab_size,
            num_blocks=self.pool.num_blocks,
            tokens_per_block=self.pool.tokens_per_block,
            eos_token_ids=eos_token_ids,
            cache_groups=tuple(CacheGroupLimits(pool.num_blocks, pool.share.group.spec.window) for pool in self.pools),
        )
        self.is_asynchronous = self.device.type == "cuda"
        self._graph_config = choose_graphs(args, self.device) if decodes else None
        self._graph_packer: GraphPacker | None = None
        self._mixed_tokens = args.scheduler_config.max_mixed_prefill_tokens

    def _load(self, args: LlmArgs, folder: Path) -> RankModel:
        """Meet the other ranks, load rank 0's share, and make a pool of as many blocks as all have room for."""
        mapping = Mapping.of(args)
        device = choose_device(args, mapping)
        if mapping.world_size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self._followers.wait_until_joined()
            self._group = RankGroup(mapping, self._followers.meeting_place, device)
        rank = RankModel(args, folder, device, self._group)
        self.pools = rank.make_pools(self._followers.agree_on_blocks(rank.num_blocks_that_fit))
        self.pool = self.pools[0]
        self.executor = (
            StepExecutor(rank.decoder, self.pool.tensor, args.max_batch_size)
            if mapping.world_size == 1
            else LeadingExecutor(rank.decoder, self.pool.tensor, args.max_batch_size, self._group, self._followers)
        )
        self._end.callback(self.executor.release)
        self.num_host_blocks = (args.kv_cache_config.host_cache_size or 0) // self.pool.block_bytes
        self.executor.make_host_blocks(self.num_host_blocks)
        return rank

    def are_ranks_alive(self) -> bool:
        """As `Followers.are_alive`."""
        return self._followers.are_alive()

    @property
    def ranks_folder(self) -> Path | None:
        """A folder that only the ranks of this model know; None if there is one."""
        return self._followers.folder

    @property
    def exporter(self) -> KvExporter | None:
        """See `Runner`; the other ranks have their own."""
        return self.executor.exporter

    @exporter.setter
    def exporter(self, exporter: KvExporter | None) -> None:
        self.executor.exporter = exporter

    def warmup(self) -> None:
        """Run a prefill and a decode, so that what is compiled or loaded lazily is ready.

        Writes to block 0 and clears it again: call it before the pool is in use.
        """
        log.info("warming up")
        sampling = Sampling(seed=0, max_tokens=2, temperature=1.0, top_p=0.5, top_k=2)
        prompt = [0] * min(2, self.limits.max_num_tokens, self.pool.tokens_per_block)
        with self._started(), torch.inference_mode():
            for token_ids, start in ((prompt, 0), (prompt[-1:], len(prompt) - 1)):
                item = BatchItem(token_ids, start, [[0]], num_sampled=1, sampling=sampling, prompt_ids=prompt)
                self.launch([item]).results()
            self._sampler.prepare(self.config.vocab_size, self.dtype, self.device)
            self.executor.prepare(self.limits.max_num_tokens, self.limits.max_seq_len)
            if self._graph_config is not None:
                self._capture(self._graph_config)

    def close(self) -> None:
        """See `Runner.close`."""
        atexit.unregister(self.close)
        self._end.close()

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """A part of the start: if it fails, nothing stays behind, and a rank that is to blame is named."""
        try:
            with self._followers.explaining():
                yield
        except BaseException:
            self.close()
            raise

    def _lose(self, error: PdserveError) -> None:
        self._on_rank_lost(error)
        self._group.abort()

    def _capture(self, config: CudaGraphConfig) -> None:
        sizes = capture_sizes(config, self.limits.max_batch_size)
        width = self.limits.tokens_per_block
        max_blocks = min(-(-self.limits.max_seq_len // width), self.limits.num_blocks)
        limits = self._chunk_limits()
        self.executor.capture(sizes, max_blocks, limits)
        self._graph_packer = GraphPacker(sizes, width, max_blocks, config.enable_padding, limits)

    def _chunk_limits(self) -> ChunkLimits | None:
        """What steps of decodes and chunks are captured for, if their size is known."""
        # A fresh prompt attends over its exact keys, which an 8-bit cache does not hold.
        num_tokens = min(self._mixed_tokens or self.limits.max_num_tokens, self.limits.max_num_tokens)
        if num_tokens > _MAX_CAPTURED_CHUNK_TOKENS or self.pool.tensor.dtype != self.dtype:
            return None
        max_context = min(_MAX_CAPTURED_CONTEXT, gathered_tokens(self.limits.max_seq_len))
        return ChunkLimits(num_tokens, _MAX_CAPTURED_CHUNKS, max_context)

    @torch.inference_mode()
    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> LaunchedStep:
        """See `Runner.launch`."""
        try:
            if copies:
                with self._followers.explaining():
                    self.executor.copy_blocks(copies)
            return self._launch(items, self._pack(items)) if items else self._launch_nothing()
        except Exception:
            # What the device was sent of tables and histories may not have reached it.
            self._sampler.forget()
            if self._graph_packer is not None:
                self._graph_packer.forget()
            raise

    @torch.inference_mode()
    def probe(self) -> None:
        """See `Runner.probe`."""
        item = BatchItem([0], 0, [[0]], num_sampled=1, sampling=Sampling(seed=0, max_tokens=1, temperature=0.0))
        self._launch([item], without_cache_writes(pack_eager([item], self.limits.tokens_per_block))).results()

    def _launch(self, items: Sequence[BatchItem], step: HostStep) -> LaunchedStep:
        with self._followers.explaining():
            output = self.executor.run(step)
        pieces = self.executor.score(step, output)
        try:
            prompts = self._score_prompts(items, step, pieces)
            tokens, outputs = self._pick(items, step.sampled_items, output)
        except Exception:
            # A row that can't be sampled is rank 0's affair: the others make the same calls as ever.
            with self._followers.explaining():
                deque(pieces, maxlen=0)
                self.executor.keep(self._index([0] * len(step.sampled_items)))
            raise
        with self._followers.explaining():
            self.executor.keep(tokens)
        return DeviceStep(len(items), step.sampled_items, tokens, prompts, outputs, self._followers.check)

    def _launch_nothing(self) -> LaunchedStep:
        """A step whose end tells that the copies before it are made."""
        return DeviceStep(0, [], self._index([]), NOTHING_SCORED, NOTHING_SCORED, self._followers.check)

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

    def _score_prompts(self, items: Sequence[BatchItem], step: HostStep, pieces: Iterator[Tensor]) -> Scored:
        """Log-probabilities of the prompt tokens that follow the step's, for the items that want them."""
        if not isinstance(step, EagerStep) or not step.scored:
            return NOTHING_SCORED
        scored = Scored([], [], [], [])
        for index in step.order:
            item = items[index]
            if not item.want_prompt_logprobs:
                continue
            targets, num_top = prompt_targets(item), item.sampling.prompt_logprobs or 0
            scored.indices.append(index)
            scored.num_rows.append(len(targets))
            scored.num_top.append(num_top)
            while targets:
                with self._followers.explaining():
                    logits = next(pieces)
                scored.chunks.append(logprobs(logits, self._index(targets[: len(logits)]), num_top))
                del targets[: len(logits)]
        return scored

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(np.array(values, np.int64), self.device)


def _sample_request(item: BatchItem) -> SampleRequest:
    return SampleRequest(item.sampling, item.prompt_ids, item.output_ids, num_pending=int(item.previous is not None))


def _check(args: LlmArgs, folder: Path) -> ModelConfig:
    """What can be said of the model before anything is started. Raises ConfigError."""
    config = describe(read_config(folder))
    Mapping.of(args).check(config.num_layers, config.num_heads, config.intermediate_size)
    return config

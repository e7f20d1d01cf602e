"""Runs steps: takes a batch of items, returns tokens and log-probabilities.

`ModelRunner` is the real `pdserve.engine.schedule.batch.Runner`: the step pipeline calls it. Owns the loaded model and,
if the model has several ranks, the processes of the others. Keeps nothing of a request between steps, but for the
sampler's table of penalties. A step is packed on the host, enqueued whole, and waited for only in `DeviceStep.results`.
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
from pdserve.engine.run.rank_model import RankModel
from pdserve.engine.run.ranks.messages import Capture, CopyBlocks, MakeHostBlocks, Order, Prepare
from pdserve.engine.run.ranks.ranks import BARE_FOLLOWER, FollowerProgram, Followers
from pdserve.engine.run.resources import choose_device, choose_graphs, choose_max_seq_len
from pdserve.engine.run.sampler import Logprobs, Sampler, is_argmax
from pdserve.engine.run.step import ChunkRoom, GraphPacker, Step, pack_eager, scored_tokens, without_cache_writes
from pdserve.engine.run.step_executor import StepExecutor
from pdserve.engine.schedule.batch import BatchItem, BatchResult, BlockCopy, LaunchedStep, confirmed
from pdserve.errors import PdserveError
from pdserve.handoff import KvExporter
from pdserve.model_store import load_generation_defaults, read_config, resolve_model
from pdserve.protocol import CacheGroupLimits, EngineLimits, Sampling, TokenLogprob

log = logging.getLogger(__name__)

# What a captured step has room for beside decodes: sequences with a chunk, tokens of chunks, and all tokens of these
# sequences. A larger step is launched operation by operation: the host is faster with that than the GPU.
_MAX_CAPTURED_CHUNKS = 4
_MAX_CAPTURED_CHUNK_TOKENS = 1024
_MAX_CAPTURED_CONTEXT = 16384


def _ignore(_: PdserveError) -> None:
    pass


class ModelRunner:
    """A loaded model and its KV pool; of a model over several ranks, rank 0 and what keeps the others in step.

    Args:
        args: the model is converted first, if it has to be.
        decodes: whether there will be decode steps; if not, no CUDA graphs are captured.
        followers: the program that the other ranks run.
        on_rank_lost: called from any thread when another rank has ended: the host must end. If it returns, whatever
            waits for that rank fails, and every later step raises `RunnerLost`.

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
        """Meet the other ranks, load rank 0's share, and make pools of as many blocks as every rank has room for."""
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
        tensors = [pool.tensor for pool in self.pools]
        self.executor = StepExecutor(rank.decoder, tensors, args.max_batch_size, self._group)
        self._end.callback(self.executor.release)
        self.num_host_blocks = (args.kv_cache_config.host_cache_size or 0) // sum(
            pool.block_bytes for pool in self.pools
        )
        self._order(MakeHostBlocks(self.num_host_blocks))
        return rank

    def are_ranks_alive(self) -> bool:
        """As `Followers.are_alive`."""
        return self._followers.are_alive()

    @property
    def ranks_folder(self) -> Path | None:
        """A folder that only the ranks of this model know; None if the model has one rank."""
        return self._followers.folder

    @property
    def exporter(self) -> KvExporter | None:
        """See `Runner`; the other ranks have their own."""
        return self.executor.exporter

    @exporter.setter
    def exporter(self, exporter: KvExporter | None) -> None:
        self.executor.exporter = exporter

    def warmup(self) -> None:
        """Run a prefill and a decode, so that lazily compiled and loaded code is ready, and capture the CUDA graphs.

        Writes to block 0 and clears it again: call it before the pool is in use.
        """
        log.info("warming up")
        sampling = Sampling(seed=0, max_tokens=2, temperature=1.0, top_p=0.5, top_k=2)
        prompt = [0] * min(2, self.limits.max_num_tokens, self.pool.tokens_per_block)
        with self._started(), torch.inference_mode():
            for token_ids, start in ((prompt, 0), (prompt[-1:], len(prompt) - 1)):
                item = BatchItem(
                    token_ids, start, [[0]] * len(self.pools), num_sampled=1, sampling=sampling, prompt_ids=prompt
                )
                self.launch([item]).results()
            self._sampler.prepare(self.config.vocab_size, self.dtype, self.device)
            self._order(Prepare(self.limits.max_num_tokens, self.limits.max_seq_len))
            if self._graph_config is not None:
                self._capture(self._graph_config)

    def close(self) -> None:
        """See `Runner.close`."""
        atexit.unregister(self.close)
        self._end.close()

    @contextlib.contextmanager
    def _started(self) -> Iterator[None]:
        """A part of the start. If it fails, the runner is closed, and the error names the rank that caused it."""
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
        most_blocks = max(pool.num_blocks for pool in self.pools)
        max_blocks = min(-(-self.limits.max_seq_len // width), most_blocks)
        room = self._chunk_room()
        self._order(Capture(sizes, max_blocks, room))
        num_groups = len(self.pools)
        self._graph_packer = GraphPacker(sizes, width, max_blocks, config.enable_padding, room, num_groups)

    def _chunk_room(self) -> ChunkRoom | None:
        """The room for chunks in captured steps; None if steps with chunks are not captured."""
        # A fresh prompt attends over its exact keys, which an 8-bit cache does not hold.
        num_tokens = min(self._mixed_tokens or self.limits.max_num_tokens, self.limits.max_num_tokens)
        if num_tokens > _MAX_CAPTURED_CHUNK_TOKENS or self.pool.tensor.dtype != self.dtype:
            return None
        max_context = min(_MAX_CAPTURED_CONTEXT, gathered_tokens(self.limits.max_seq_len))
        return ChunkRoom(num_tokens, _MAX_CAPTURED_CHUNKS, max_context)

    @torch.inference_mode()
    def launch(self, items: Sequence[BatchItem], copies: Sequence[BlockCopy] = ()) -> LaunchedStep:
        """See `Runner.launch`."""
        try:
            if copies:
                with self._followers.explaining():
                    self._order(CopyBlocks(list(copies)))
            return self._launch(items, self._pack(items)) if items else self._launch_nothing()
        except Exception:
            # Block tables and histories that were sent with this step may not have reached the device.
            self._sampler.forget()
            if self._graph_packer is not None:
                self._graph_packer.forget()
            raise

    @torch.inference_mode()
    def probe(self) -> None:
        """See `Runner.probe`."""
        greedy, tables = Sampling(seed=0, max_tokens=1, temperature=0.0), [[0]] * len(self.pools)
        item = BatchItem([0], 0, tables, num_sampled=1, sampling=greedy)
        self._launch([item], without_cache_writes(pack_eager([item], self.limits.tokens_per_block))).results()

    def _launch(self, items: Sequence[BatchItem], step: Step) -> LaunchedStep:
        with self._followers.explaining():
            self._followers.send(step)
            logits, greedy = self.executor.run(step)
        pieces = self.executor.score(step)
        try:
            prompts = self._score_prompts(items, step, pieces)
            tokens, outputs = self._pick(items, step.sampled_items, logits, greedy)
        except Exception:
            # Only rank 0 samples. The other ranks do not know that it failed, so the collective calls must all be made.
            with self._followers.explaining():
                deque(pieces, maxlen=0)
                self.executor.keep(self._index([0] * len(step.sampled_items)))
            raise
        with self._followers.explaining():
            self.executor.keep(tokens)
        may_draft = enumerate(items) if step.kind != "decodes" else ()
        drafts = {index: item.drafts for index, item in may_draft if item.num_sampled > 1}
        return DeviceStep(len(items), step.sampled_items, tokens, drafts, prompts, outputs, self._followers.check)

    def _launch_nothing(self) -> LaunchedStep:
        """A step without items: when it is over, the copies before it are made."""
        return DeviceStep(0, (), self._index(()), {}, (), (), self._followers.check)

    def _order(self, order: Order) -> None:
        """Have all ranks carry `order` out."""
        self._followers.send(order)
        self.executor.obey(order)

    def _pack(self, items: Sequence[BatchItem]) -> Step:
        step = None if self._graph_packer is None else self._graph_packer.pack(items)
        return step or pack_eager(items, self.limits.tokens_per_block)

    def _pick(
        self, items: Sequence[BatchItem], indices: list[int], logits: Tensor, greedy: Tensor | None
    ) -> tuple[Tensor, list[Logprobs]]:
        """Draw a token for each row of logits, and compute the log-probabilities that some items want.

        Args:
            indices: row i belongs to item `indices[i]`.
            greedy: the argmax of each row, if it is known already.
        """
        if not indices:
            return self._index(()), []
        drawing = [items[index] for index in indices]
        tokens = greedy if greedy is not None and all(map(is_argmax, drawing)) else None
        if tokens is None:
            tokens = self._sampler.sample(logits, drawing)
        wanted = [row for row, item in enumerate(drawing) if item.sampling.logprobs is not None]
        if not wanted:
            return tokens, []
        num_top = [drawing[row].sampling.logprobs or 0 for row in wanted]
        at = self._index(wanted)
        found = logits.index_select(0, at), tokens.index_select(0, at)
        return tokens, [Logprobs.of(*found, num_top, [indices[row] for row in wanted])]

    def _score_prompts(self, items: Sequence[BatchItem], step: Step, pieces: Iterator[Tensor]) -> list[Logprobs]:
        """Log-probabilities of the scored tokens of the items that want them; `pieces` yields the logits."""
        scored: list[Logprobs] = []
        tokens: dict[int, list[int]] = {}
        for start, stop, index in step.scored:
            item, num_rows = items[index], stop - start
            left = tokens.setdefault(index, scored_tokens(item))
            with self._followers.explaining():
                logits = next(pieces)
            num_top = [item.sampling.prompt_logprobs or 0] * num_rows
            scored.append(Logprobs.of(logits, self._index(left[:num_rows]), num_top, [index] * num_rows))
            del left[:num_rows]
        return scored

    def _index(self, values: Sequence[int]) -> Tensor:
        return upload(np.array(values, np.int64), self.device)


class DeviceStep:
    """A launched step whose results are being copied to the host.

    It is the real `pdserve.engine.schedule.batch.LaunchedStep`.

    Args:
        sampled: of each of `tokens`, the number of its item.
        tokens: [num_sampled] on the device.
        drafts: by item, for the items that have drafts.
        prompts: log-probabilities of prompt tokens.
        outputs: log-probabilities of `tokens`, for the items that want them.
        verify: called once the device is done. It raises if another rank was lost, for then the results mean nothing.
    """

    def __init__(
        self,
        num_items: int,
        sampled: Sequence[int],
        tokens: Tensor,
        drafts: dict[int, Sequence[int]],
        prompts: Sequence[Logprobs],
        outputs: Sequence[Logprobs],
        verify: Callable[[], None],
    ) -> None:
        self._num_items = num_items
        self._verify = verify
        self._sampled = sampled
        self._drafts = drafts
        self._tokens = tokens.to("cpu", non_blocking=True)
        self._prompts, self._outputs = ([piece.to_host() for piece in scored] for scored in (prompts, outputs))
        self._done = torch.cuda.current_stream(tokens.device).record_event() if tokens.is_cuda else None

    def results(self) -> list[BatchResult]:
        """See `LaunchedStep.results`; an error of the device is torch's."""
        try:
            if self._done is not None:
                self._done.synchronize()
        finally:
            self._verify()
        drawn, items = self._drawn(), range(self._num_items)
        if not (self._prompts or self._outputs):
            return [BatchResult(drawn.get(index, ())) for index in items]
        prompts, outputs = _by_item(self._prompts), _by_item(self._outputs)
        results = []
        for index in items:
            tokens = drawn.get(index, ())
            results.append(BatchResult(tokens, outputs.get(index, [])[: len(tokens)], prompts.get(index)))
        return results

    def _drawn(self) -> dict[int, Sequence[int]]:
        """The tokens that count, by item."""
        tokens = zip(self._sampled, self._tokens.tolist(), strict=True)
        if not self._drafts:
            return {index: (token,) for index, token in tokens}
        draws: dict[int, list[int]] = {}
        for index, token in tokens:
            draws.setdefault(index, []).append(token)
        return {index: confirmed(tokens, self._drafts.get(index, ())) for index, tokens in draws.items()}


def _by_item(scored: Sequence[Logprobs]) -> dict[int, list[TokenLogprob]]:
    entries: dict[int, list[TokenLogprob]] = {}
    for piece in scored:
        for index, entry in zip(piece.items, piece.entries(), strict=True):
            entries.setdefault(index, []).append(entry)
    return entries


def _check(args: LlmArgs, folder: Path) -> ModelConfig:
    """The model's description, after all checks that need no process and no weights. Raises ConfigError."""
    config = describe(read_config(folder))
    Mapping.of(args).check(config.num_layers, config.num_heads, config.intermediate_size)
    return config

"""Runs packed steps on one rank's device. Every rank of an engine has one and is given the same steps.

Owns the decoder, the CUDA graphs and the tokens that the newest step has sampled, which stay on the device so that the
next step can be launched before the host knows them; the KV pool is the runner's. What is sampled, and how, is not its
business. `exporter`, if there is one, is told of KV as it is launched, so that its transfer hides behind the layers
that follow. `on_launched` is called after each step and after each batch of copies, also if one has failed: what was
enqueued of it touches blocks that are given to others now, who wait for this point of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch
from pdserve.engine.layers.step_input import GroupInput, OutputRows, StepInput, upload
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.run.block_copier import BlockCopier
from pdserve.engine.run.decode_graphs import DecodeGraphs
from pdserve.engine.run.host_step import ChunkLimits, EagerStep, GraphStep, HostStep, MixedStep
from pdserve.engine.schedule.batch import BlockCopy
from pdserve.handoff import KvExporter
from pdserve.protocol import Key

# Layers whose KV is pushed together have at least so many bytes: fewer would cost more messages than they hide.
_PUSHED_BYTES = 64 << 20


def _ignore() -> None:
    pass


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a launched step leaves on the device, valid until the next one.

    `logits` [num_sampled, vocab_size] in the order of the step's `sampled_items`; `greedy` [num_sampled] is their
    argmax where that is known already; `hidden` [num_tokens, hidden_size] only where a prompt is scored.
    """

    logits: Tensor
    greedy: Tensor | None = None
    hidden: Tensor | None = None


class StepExecutor:
    """Life: steps may be run as soon as it exists; `capture` makes decodes cheaper.

    Args:
        max_batch_size: most items of a step.
    """

    def __init__(self, decoder: Decoder, pool: Tensor, max_batch_size: int) -> None:
        self._decoder = decoder
        self._pool = pool
        self._copier = BlockCopier(pool, 0)
        self._last_tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=pool.device)
        self._sampled_items: Tensor | slice = slice(0)
        self._graphs: DecodeGraphs | None = None
        self.exporter: KvExporter | None = None
        self.on_launched: Callable[[], None] = _ignore

    @property
    def device(self) -> torch.device:
        return self._pool.device

    def prepare(self, max_tokens: int, max_seq_len: int) -> None:
        """Clear block 0, where steps that warmed up have written, and do ahead what later steps would wait for.

        Args:
            max_tokens: of a step.
            max_seq_len: tokens of the longest sequence.
        """
        self._pool[0].zero_()
        self._decoder.prepare((self._pool,), max_tokens, max_seq_len)

    def capture(self, sizes: list[int], max_blocks: int, limits: ChunkLimits | None) -> None:
        """Capture CUDA graphs as `DecodeGraphs` says; the pool must be unused and is left as it was."""
        self._graphs = DecodeGraphs(self._decoder, self._pool, self._last_tokens, sizes, max_blocks, limits)

    def make_host_blocks(self, num_blocks: int) -> None:
        """Allocate the host's blocks. Raises ConfigError if there is no memory for them."""
        self._copier = BlockCopier(self._pool, num_blocks)

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Launch `copies`, one after the other."""
        try:
            self._copier.run(copies)
        finally:
            self.on_launched()

    def release(self) -> None:
        """Give the CUDA graphs up: while they exist, NCCL does not let go of a communicator that they use."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def run(self, step: HostStep) -> StepOutput:
        """Launch `step`. `score` and `keep` must follow, in this order, before the next."""
        try:
            return self._run_eagerly(step) if isinstance(step, EagerStep) else self._replay(step)
        finally:
            self.on_launched()

    def score(self, step: HostStep, output: StepOutput) -> Iterator[Tensor]:
        """Logits of each piece of rows that scores prompt tokens, in the order of `EagerStep.scored`."""
        for start, stop in step.scored if isinstance(step, EagerStep) else ():
            assert output.hidden is not None
            yield self._decoder.logits(output.hidden[start:stop])

    def keep(self, tokens: Tensor) -> None:
        """`tokens` [num_sampled] were sampled from the newest step's logits: the next step may name them."""
        self._last_tokens[self._sampled_items] = tokens

    def _replay(self, step: GraphStep | MixedStep) -> StepOutput:
        assert self._graphs is not None, "a step was packed for a graph, and none is captured"
        replayed = self._graphs.replay(step) if isinstance(step, GraphStep) else self._graphs.replay_mixed(step)
        self._sampled_items = replayed.items
        return StepOutput(replayed.logits, replayed.tokens)

    def _tell_exporter(self, exports: Sequence[tuple[Key, int, int]]) -> Callable[[int], None] | None:
        """What tells the exporter how far these sequences are, each time that enough layers are launched."""
        exporter = self.exporter
        if exporter is None or not exports:
            return None
        _, num_layers, kv_factor, num_heads, _, head_dim = self._pool.shape
        layer_bytes = kv_factor * num_heads * head_dim * self._pool.element_size()
        layer_bytes *= max(end - start for _, start, end in exports)
        stride = min(-(-_PUSHED_BYTES // layer_bytes), num_layers)

        def tell(num_launched: int) -> None:
            if num_launched % stride == 0 or num_launched == num_layers:
                for key, _, end in exports:
                    exporter.computed(key, end, num_launched)

        return tell

    def _run_eagerly(self, step: EagerStep) -> StepOutput:
        parts = torch.split(upload(step.values, self._pool.device), step.sizes)
        token_ids, positions, slots, q_starts, seq_lens, tables, unknown_rows, previous_items, *sampled = parts
        rows, self._sampled_items, seqs = sampled
        if len(unknown_rows):
            token_ids = token_ids.index_copy(0, unknown_rows, self._last_tokens.index_select(0, previous_items))
        batch = PagedBatch(step.q_lens, step.seq_lens, q_starts, seq_lens, tables.view(len(step.q_lens), -1))
        outputs = None
        if not self._needs_all_rows(step):
            outputs = OutputRows(rows, (_last_tokens_of(batch, step.sampled_seqs, seqs),))
        groups = (GroupInput(self._pool, slots, batch),)
        step_input = StepInput(token_ids, positions, groups, outputs)
        hidden = self._decoder.forward(step_input, self._tell_exporter(step.exports))
        wanted = hidden if len(hidden) == len(rows) else hidden.index_select(0, rows)
        # A chunk in the middle of a prompt samples nothing.
        logits = self._decoder.logits(wanted) if len(rows) else wanted
        return StepOutput(logits, hidden=hidden if step.scored else None)

    def _needs_all_rows(self, step: EagerStep) -> bool:
        """Whether the last layer must be computed of rows that sample nothing."""
        # A fresh prompt attends over its exact keys, and its last token must not see what an 8-bit cache made of them.
        is_exact = self._pool.dtype.itemsize > 1
        return bool(step.scored) or not is_exact or len(step.sampled_items) == sum(step.q_lens)


def _last_tokens_of(batch: PagedBatch, seqs: list[int], on_device: Tensor) -> PagedBatch:
    """The sequences `seqs`, which are `on_device` too, each with its last token only."""
    starts = torch.arange(len(seqs) + 1, device=on_device.device)
    lengths, tables = batch.seq_lens_tensor.index_select(0, on_device), batch.block_tables.index_select(0, on_device)
    return PagedBatch([1] * len(seqs), [batch.seq_lens[seq] for seq in seqs], starts, lengths, tables)

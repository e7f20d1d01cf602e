"""Runs packed steps on one rank's device. Every rank of an engine has a `StepExecutor`, and all get the same orders.

`ModelRunner` calls it on rank 0, the follower's process on each other rank. Owns the decoder, the CUDA graphs, the
blocks in host memory, and the tokens that the newest step has sampled: they stay on the device, so that the next step
can be launched before the host knows them. The KV pools are the runner's. How tokens are sampled is the sampler's.

All ranks make the same collective calls in the same order: the forward pass, the logits of the rows that sample, the
logits of each scored piece, and last the sampled tokens, which rank 0 sends to all.

`exporter`, if there is one, is told how many layers of KV are enqueued, so that their transfer hides behind the layers
that follow. `on_launched` is called after each step and each batch of copies, also after one that failed: part of it
may be enqueued and touch blocks that belong to another sequence by now, whose transfer waits for this point of the
stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch
from pdserve.engine.layers.step_input import GroupInput, OutputRows, StepInput, upload
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.parallel.group import SINGLE_RANK, Group
from pdserve.engine.run.block_copier import BlockCopier
from pdserve.engine.run.decode_graphs import DecodeGraphs
from pdserve.engine.run.ranks.messages import Capture, CopyBlocks, MakeHostBlocks, Order, Prepare
from pdserve.engine.run.step import Step
from pdserve.handoff import KvExporter
from pdserve.protocol import Key

# The exporter is told of layers whose KV has at least so many bytes together: more messages would cost more than they
# hide.
_PUSHED_BYTES = 64 << 20


def _ignore() -> None:
    pass


class StepExecutor:
    """See the module. It runs steps as soon as it exists; the order `Capture` makes decodes cheaper.

    Args:
        decoder: this rank's share of the model.
        pools: one a cache group.
        max_batch_size: the greatest number of items in a step.
        group: what this rank exchanges with the others.
    """

    def __init__(
        self, decoder: Decoder, pools: Sequence[Tensor], max_batch_size: int, group: Group = SINGLE_RANK
    ) -> None:
        self._decoder = decoder
        self._pools = pools
        self._group = group
        self._copier = BlockCopier(pools, 0)
        self._last_tokens = torch.zeros(max_batch_size, dtype=torch.int64, device=pools[0].device)
        self._sampled_items: Tensor | slice = slice(0)
        self._scored: Tensor | None = None
        self._graphs: DecodeGraphs | None = None
        self.exporter: KvExporter | None = None
        self.on_launched: Callable[[], None] = _ignore

    def obey(self, order: Order) -> None:
        """Carry out an order that all ranks get. Raises ConfigError if there is no memory for the host's blocks."""
        match order:
            case Prepare():
                for pool in self._pools:
                    pool[0].zero_()
                self._decoder.prepare(self._pools, order.max_tokens, order.max_seq_len)
            case Capture():
                self._graphs = DecodeGraphs(
                    self._decoder, self._pools, self._last_tokens, order.sizes, order.max_blocks, order.room
                )
            case MakeHostBlocks():
                self._copier = BlockCopier(self._pools, order.num_blocks)
            case CopyBlocks():
                try:
                    self._copier.run(order.copies)
                finally:
                    self.on_launched()
            case Step():
                self._follow(order)

    def release(self) -> None:
        """Destroy the CUDA graphs. Until then NCCL can't close a communicator that they use."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def run(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Launch `step`. The caller then calls `score` and `keep`, in this order, before the next step.

        Returns:
            Logits [num_sampled, vocab_size] in the order of `Step.sampled_items`, valid until the next step; and their
            argmax [num_sampled], None if it is not computed yet.
        """
        try:
            return self._run_eagerly(step) if step.kind == "eager" else self._replay(step)
        finally:
            self.on_launched()

    def score(self, step: Step) -> Iterator[Tensor]:
        """Yield the logits [num_rows, vocab_size] of each piece of `Step.scored`, in order."""
        for start, stop, _ in step.scored:
            assert self._scored is not None
            yield self._decoder.logits(self._scored[start:stop])

    def keep(self, tokens: Tensor) -> None:
        """Keep the tokens [num_sampled] that were sampled from the newest step's logits, for the step that names them
        by their item. Rank 0's tokens count; on the other ranks `tokens` is overwritten with them."""
        if len(tokens):
            self._group.broadcast(tokens)
        self._last_tokens[self._sampled_items] = tokens
        self._scored = None

    def _follow(self, step: Step) -> None:
        """Run `step` on a rank that samples nothing."""
        self.run(step)
        for _ in self.score(step):
            pass
        self.keep(torch.empty(len(step.sampled_items), dtype=torch.int64, device=self._last_tokens.device))

    def _replay(self, step: Step) -> tuple[Tensor, Tensor]:
        assert self._graphs is not None, "a step was packed for a graph, and none is captured"
        logits, tokens, self._sampled_items = self._graphs.replay(step)
        return logits, tokens

    def _run_eagerly(self, step: Step) -> tuple[Tensor, None]:
        parts = torch.split(upload(step.values, self._last_tokens.device), step.sizes)
        token_ids, positions, slots, q_starts, seq_lens, tables, unknown_rows, previous_items, *sampled = parts
        rows, self._sampled_items, seqs = sampled
        if len(unknown_rows):
            token_ids = token_ids.index_copy(0, unknown_rows, self._last_tokens.index_select(0, previous_items))
        shape = (len(self._pools), len(step.q_lens), -1)
        batches = [
            PagedBatch(step.q_lens, step.seq_lens, q_starts, seq_lens, table) for table in tables.view(shape).unbind(0)
        ]
        outputs = None
        if not self._needs_all_rows(step):
            outputs = _output_rows(batches, step.sampled_lens, rows, seqs, positions)
        own_slots = slots.view(len(self._pools), -1).unbind(0)
        groups = [GroupInput(*each) for each in zip(self._pools, own_slots, batches, strict=True)]
        step_input = StepInput(token_ids, positions, groups, outputs)
        hidden = self._decoder.forward(step_input, self._tell_exporter(step.exports))
        wanted = hidden if len(hidden) == len(rows) else hidden.index_select(0, rows)
        self._scored = hidden if step.scored else None
        # A chunk in the middle of a prompt samples nothing.
        return self._decoder.logits(wanted) if len(rows) else wanted, None

    def _needs_all_rows(self, step: Step) -> bool:
        """Whether the last layer must be computed for all rows, and not only for those that sample."""
        # A fresh prompt attends over its exact keys. Computed alone, its last row would read them from the cache, where
        # 8 bits have rounded them.
        is_exact = all(pool.dtype.itemsize > 1 for pool in self._pools)
        return bool(step.scored) or not is_exact or len(step.sampled_items) == sum(step.q_lens)

    def _tell_exporter(self, exports: Sequence[tuple[Key, int, int]]) -> Callable[[int], None] | None:
        """A callback for the decoder: it tells the exporter of these sequences' KV whenever enough layers are enqueued.
        None if there is nothing to tell."""
        exporter = self.exporter
        if exporter is None or not exports:
            return None
        _, _, kv_factor, num_heads, _, head_dim = self._pools[0].shape
        num_layers = sum(pool.shape[1] for pool in self._pools)
        layer_bytes = kv_factor * num_heads * head_dim * self._pools[0].element_size()
        layer_bytes *= max(end - start for _, start, end in exports)
        stride = min(-(-_PUSHED_BYTES // layer_bytes), num_layers)

        def tell(num_launched: int) -> None:
            if num_launched % stride == 0 or num_launched == num_layers:
                for key, _, end in exports:
                    exporter.computed(key, end, num_launched)

        return tell


def _output_rows(
    batches: Sequence[PagedBatch], sampled_lens: list[int], rows: Tensor, seqs: Tensor, positions: Tensor
) -> OutputRows:
    """The rows after which a token is drawn, as the last layer computes them: each the last token of its sequence.

    Args:
        batches: the step's, one a cache group.
        sampled_lens: of each row, the tokens of its sequence up to it.
        rows: [num_sampled] their numbers in the step.
        seqs: [num_sampled] the place of each row's sequence in `batches`.
        positions: [num_tokens] of all rows of the step.
    """
    ones = [1] * len(sampled_lens)
    starts = torch.arange(len(ones) + 1, device=rows.device)
    lengths = positions.index_select(0, rows) + 1
    tables = [batch.block_tables.index_select(0, seqs) for batch in batches]
    return OutputRows(rows, [PagedBatch(ones, sampled_lens, starts, lengths, table) for table in tables])

"""Runs packed steps on one rank's device. Every rank of an engine has one and is given the same commands.

Owns the decoder, the CUDA graphs, the host's blocks and the tokens that the newest step has sampled, which stay on the
device so that the next step can be launched before the host knows them; the KV pools are the runner's. What is sampled,
and how, is not its business. All ranks make the same collective calls: the forward pass, the logits of what is sampled
and of each scored piece, and at last the sampled tokens, which rank 0 gives to all. `exporter`, if there is one, is
told of KV as it is launched, so that its transfer hides behind the layers that follow. `on_launched` is called after
each step and after each batch of copies, also if one has failed: what was enqueued of it touches blocks that are given
to others now, who wait for this point of the stream.
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

# Layers whose KV is pushed together have at least so many bytes: fewer would cost more messages than they hide.
_PUSHED_BYTES = 64 << 20


def _ignore() -> None:
    pass


class StepExecutor:
    """Life: steps may be run as soon as it exists; `Capture` makes decodes cheaper.

    Args:
        pools: one a cache group.
        max_batch_size: most items of a step.
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
        """Do what all ranks do. Raises ConfigError if there is no memory for the host's blocks."""
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
        """Give the CUDA graphs up: while they exist, NCCL does not let go of a communicator that they use."""
        if self._graphs is not None:
            self._graphs.release()
            self._graphs = None

    def run(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Launch `step`. `score` and `keep` must follow, in this order, before the next.

        Returns logits [num_sampled, vocab_size] in the order of the step's `sampled_items`, valid until the next step,
        and [num_sampled] their argmax where that is known already.
        """
        try:
            return self._run_eagerly(step) if step.kind == "eager" else self._replay(step)
        finally:
            self.on_launched()

    def score(self, step: Step) -> Iterator[Tensor]:
        """Logits of each piece of rows that scores prompt tokens, in the order of `Step.scored`."""
        for start, stop, _ in step.scored:
            assert self._scored is not None
            yield self._decoder.logits(self._scored[start:stop])

    def keep(self, tokens: Tensor) -> None:
        """`tokens` [num_sampled], those of rank 0, were sampled from the newest step's logits: the next step may name
        them."""
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
        """Whether the last layer must be computed of rows that sample nothing."""
        # A fresh prompt attends over its exact keys, and its last token must not see what an 8-bit cache made of them.
        is_exact = all(pool.dtype.itemsize > 1 for pool in self._pools)
        return bool(step.scored) or not is_exact or len(step.sampled_items) == sum(step.q_lens)

    def _tell_exporter(self, exports: Sequence[tuple[Key, int, int]]) -> Callable[[int], None] | None:
        """What tells the exporter how far these sequences are, each time that enough layers are launched."""
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
    """The `rows` after which a token is drawn, at these of the step's `positions`: each as if it were the last of its
    sequence, whose place in `batches` is in `seqs`."""
    ones = [1] * len(sampled_lens)
    starts = torch.arange(len(ones) + 1, device=rows.device)
    lengths = positions.index_select(0, rows) + 1
    tables = [batch.block_tables.index_select(0, seqs) for batch in batches]
    return OutputRows(rows, [PagedBatch(ones, sampled_lens, starts, lengths, table) for table in tables])

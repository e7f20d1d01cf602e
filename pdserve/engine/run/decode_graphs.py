"""Decode steps as CUDA graphs, alone or with prompts' chunks: one launch instead of some four hundred.

`StepExecutor` captures and replays them. Owns the graphs, one for each captured batch size and kind, and the tensors
that they read and write. A step of n decodes replays the smallest graph that holds n. The rows past n are padding:
their slot of -1 writes nowhere, and their length of 0 attends over nothing. The decodes' block tables stay on the
device between steps, and only changes are sent. A row's token comes from the host, or is the one that the step before
has sampled. Chunks have a room of fixed size behind the decodes, and their block tables are sent with each step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pd_kernels import sampling
from pd_kernels.paged_attention import PagedBatch, PrefillRoom
from pdserve.config import CudaGraphConfig
from pdserve.engine.layers.step_input import GroupInput, StepInput, upload
from pdserve.engine.models.decoder import Decoder
from pdserve.engine.run.step import (
    LENGTH,
    POSITION,
    PREVIOUS,
    TOKEN,
    ChunkRoom,
    Step,
    mixed_sizes,
    padding_rows,
    slot_of,
)
from pdserve.progress import Progress

log = logging.getLogger(__name__)


def capture_sizes(config: CudaGraphConfig, max_batch_size: int) -> list[int]:
    """The batch sizes to capture, ascending: those asked for, or 1, 2, 4 and then multiples of 8.

    Of sizes that no batch can have, the largest that one can have is captured.
    """
    largest = min(config.max_batch_size or max_batch_size, max_batch_size)
    if config.batch_sizes is not None:
        return sorted({min(size, largest) for size in config.batch_sizes})
    return sorted({*(size for size in (1, 2, 4) if size <= largest), *range(8, largest, 8), largest})


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    tokens: Tensor


class _Chunks:
    """What graphs read of the chunks in a step."""

    def __init__(
        self, room: ChunkRoom, num_groups: int, max_blocks: int, num_sampled: int, device: torch.device
    ) -> None:
        self.room = room
        self.rows = upload(padding_rows(num_groups, room.num_tokens), device)
        self._spans = torch.zeros((room.num_seqs, 3), dtype=torch.int64, device=device)
        self._tables = torch.zeros((num_groups, room.num_seqs, max_blocks), dtype=torch.int64, device=device)
        self.sampled = torch.zeros(num_sampled + room.num_seqs, dtype=torch.int64, device=device)

    def prefill_room(self, group: int) -> PrefillRoom:
        return PrefillRoom(self._spans, self._tables[group], self.room.num_tokens, self.room.max_context)

    def fill(self, flat: Tensor, num_sampled: int) -> tuple[Tensor, Tensor]:
        """Take over what `flat` begins with; the items of the rows that sample, and what is left."""
        for tensor in (self.rows, self._spans, self._tables, self.sampled[:num_sampled]):
            tensor.copy_(flat[: tensor.numel()].view(tensor.shape))
            flat = flat[tensor.numel() :]
        return flat[:num_sampled], flat[num_sampled:]


class DecodeGraphs:
    """Captures at construction; the pools must be unused and are left as they were.

    Args:
        pools: one a cache group.
        last_tokens: what the newest step has sampled, by its items; read by every replay.
        sizes: batch sizes to capture, ascending.
        max_blocks: blocks of the longest sequence.
        room: for chunks, which `mixed_sizes` of the graphs are captured with once more; None: there is none.
    """

    def __init__(
        self,
        decoder: Decoder,
        pools: Sequence[Tensor],
        last_tokens: Tensor,
        sizes: Sequence[int],
        max_blocks: int,
        room: ChunkRoom | None = None,
    ) -> None:
        self._decoder = decoder
        self._pools = pools
        self._last_tokens = last_tokens
        largest, self._device, num_groups = sizes[-1], last_tokens.device, len(pools)
        self._rows = upload(padding_rows(num_groups, largest), self._device)
        self._tables = torch.zeros((num_groups, largest, max_blocks), dtype=torch.int64, device=self._device)
        self._starts = torch.arange(largest + 1, device=self._device)
        self._chunks = None if room is None else _Chunks(room, num_groups, max_blocks, largest, self._device)
        self._captured: dict[int, _Captured] = {}
        self._mixed: dict[int, _Captured] = {}
        self._capture_all(sizes)

    def replay(self, step: Step) -> tuple[Tensor, Tensor, Tensor | slice]:
        """Run a step of decodes, alone or with chunks.

        Returns logits [num_sampled, vocab_size] and their argmax [num_sampled], valid until the next replay, and the
        items that they are of, as an index.
        """
        flat, num_sampled = upload(step.values, self._device), len(step.sampled_items)
        if step.kind == "decodes":
            self._fill(step.size, flat)
            return *_replay(self._captured[step.size], num_sampled), slice(num_sampled)
        assert self._chunks is not None, "a step was packed for a graph with chunks, and none is captured"
        num_rows = len(self._rows) * step.size
        items, updates = self._chunks.fill(flat[num_rows:], step.size + self._chunks.room.num_seqs)
        self._fill(step.size, torch.cat([flat[:num_rows], updates]))
        return *_replay(self._mixed[step.size], num_sampled), items[:num_sampled]

    def release(self) -> None:
        """Destroy the graphs."""
        for captured in (*self._captured.values(), *self._mixed.values()):
            captured.graph.reset()
        self._captured.clear()
        self._mixed.clear()

    def _fill(self, size: int, flat: Tensor) -> None:
        """Take over the decodes' rows and the updates of their tables."""
        num_rows = len(self._rows) * size
        self._rows[:, :size].copy_(flat[:num_rows].view(-1, size))
        if len(flat) > num_rows:
            at, values = flat[num_rows:].view(2, -1)
            self._tables.view(-1).index_copy_(0, at, values)

    def _capture_all(self, sizes: Sequence[int]) -> None:
        """Largest first, so that the smaller graphs fit into the memory of the larger."""
        started_s = time.monotonic()
        memory = torch.cuda.graph_pool_handle()
        runs: list[tuple[dict[int, _Captured], int, Callable[[int], tuple[Tensor, Tensor]]]] = []
        if self._chunks is not None:
            runs += [(self._mixed, size, self._run_mixed) for size in mixed_sizes(sizes)[::-1]]
        runs += [(self._captured, size, self._run) for size in sizes[::-1]]
        quiet = not self._decoder.is_first_rank
        with Progress(log, "capturing CUDA graphs", len(runs), "graphs", quiet) as progress:
            for graphs, size, run in runs:
                graphs[size] = self._capture(size, run, memory)
                progress.advance()
        log.info("captured %d CUDA graphs in %.1f s", len(runs), time.monotonic() - started_s)

    def _capture(self, size: int, run: Callable[[int], tuple[Tensor, Tensor]], memory: Any) -> _Captured:
        # Kernels compile and libraries allocate on their first run, which must not be the captured one.
        run(size)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: NCCL's looks at its events.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits, tokens = run(size)
        return _Captured(graph, logits, tokens)

    def _run(self, size: int) -> tuple[Tensor, Tensor]:
        return self._sample(self._decoder.forward(self._input(size, self._rows[:, :size], None)))

    def _run_mixed(self, size: int) -> tuple[Tensor, Tensor]:
        chunks = self._chunks
        assert chunks is not None, "there is room for chunks"
        rows = torch.cat([self._rows[:, :size], chunks.rows], 1)
        hidden = self._decoder.forward(self._input(size, rows, chunks))
        return self._sample(hidden.index_select(0, chunks.sampled[: size + chunks.room.num_seqs]))

    def _input(self, size: int, rows: Tensor, chunks: _Chunks | None) -> StepInput:
        previous = rows[PREVIOUS]
        sampled = self._last_tokens.index_select(0, previous.clamp(min=0))
        token_ids = torch.where(previous < 0, rows[TOKEN], sampled)
        ones, starts, lengths = [1] * size, self._starts[: size + 1], rows[LENGTH, :size]
        groups = []
        for group, pool in enumerate(self._pools):
            prefill_room = None if chunks is None else chunks.prefill_room(group)
            batch = PagedBatch(ones, ones, starts, lengths, self._tables[group, :size], prefill_room)
            groups.append(GroupInput(pool, rows[slot_of(group)], batch))
        return StepInput(token_ids, rows[POSITION], groups)

    def _sample(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._decoder.logits(hidden)
        return logits, sampling.sample(logits, None, None, None, None, None) if len(logits) else self._last_tokens[:0]


def _replay(captured: _Captured, num_sampled: int) -> tuple[Tensor, Tensor]:
    captured.graph.replay()
    return captured.logits[:num_sampled], captured.tokens[:num_sampled]

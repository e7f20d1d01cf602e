"""Decode steps as CUDA graphs: one launch instead of some four hundred.

Owns the graphs, one for each captured batch size, and the tensors they read and write. A step of n sequences, each with
one new token, replays the smallest graph that holds n; the rows past n are padding, whose KV slot of -1 is written
nowhere and whose sequence length of 0 is attended over nothing. Block tables stay on the device between steps and only
rows that changed are sent.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch
from pdserve.config import CudaGraphConfig
from pdserve.engine.batch import BatchItem
from pdserve.engine.layers.step_input import StepInput, upload
from pdserve.engine.models.decoder import Decoder

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

_TOKEN, _POSITION, _SLOT, _LENGTH = range(4)
_PADDING = np.array([0, 0, -1, 0], np.int64)


def capture_sizes(config: CudaGraphConfig, max_batch_size: int) -> list[int]:
    """The batch sizes to capture, ascending: those asked for, or 1, 2, 4 and then multiples of 8."""
    largest = min(config.max_batch_size or max_batch_size, max_batch_size)
    if config.batch_sizes is not None:
        return sorted({size for size in config.batch_sizes if size <= largest})
    return sorted({*(size for size in (1, 2, 4) if size <= largest), *range(8, largest, 8), largest})


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    tokens: Tensor


class DecodeGraphs:
    """Captures at construction; the pool must be unused and is left as it was.

    Args:
        sizes: batch sizes to capture, ascending.
        max_blocks: blocks of the longest sequence.
        pad: whether a step may run in a larger graph.
    """

    def __init__(self, decoder: Decoder, pool: Tensor, sizes: Sequence[int], max_blocks: int, pad: bool) -> None:
        self._decoder = decoder
        self._pool = pool
        self._tokens_per_block = pool.shape[4]
        self._sizes = sizes
        self._pad = pad
        largest = sizes[-1]
        self._rows = torch.empty((4, largest), dtype=torch.int64, device=pool.device)
        self._rows.copy_(upload(np.repeat(_PADDING[:, None], largest, axis=1), pool.device))
        self._tables = torch.zeros((largest, max_blocks), dtype=torch.int64, device=pool.device)
        self._starts = torch.arange(largest + 1, device=pool.device)
        # What the device's tables hold: the sequence's own (growing) list, and how much of it was sent.
        self._sent: list[tuple[Sequence[int], int]] = [((), 0)] * largest
        self._captured: dict[int, _Captured] = {}
        self._capture_all()

    def size_for(self, items: Sequence[BatchItem]) -> int | None:
        """The graph that can run `items`, None if none can."""
        at = bisect.bisect_left(self._sizes, len(items))
        if at == len(self._sizes) or (not self._pad and self._sizes[at] != len(items)):
            return None
        decodes = all(len(item.token_ids) == 1 and item.sample and not item.want_prompt_logprobs for item in items)
        return self._sizes[at] if decodes else None

    def replay(self, size: int, items: Sequence[BatchItem]) -> tuple[Tensor, Tensor]:
        """Logits [n, vocab_size] and their argmax [n], in the order of `items`; valid until the next replay."""
        self._send(size, items)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.logits[: len(items)], captured.tokens[: len(items)]

    def _send(self, size: int, items: Sequence[BatchItem]) -> None:
        """Bring the device's inputs up to date, in one copy from the host and one or two on the device."""
        width = self._tokens_per_block
        rows = np.repeat(_PADDING[:, None], size, axis=1)
        table_at: list[int] = []
        table_values: list[int] = []
        table_width = self._tables.shape[1]
        for row, item in enumerate(items):
            start, block_ids = item.start, item.block_ids
            rows[:, row] = (item.token_ids[0], start, block_ids[start // width] * width + start % width, start + 1)
            owner, sent = self._sent[row]
            if owner is not block_ids or sent != len(block_ids):
                first = sent if owner is block_ids and sent < len(block_ids) else 0
                table_at.extend(range(row * table_width + first, row * table_width + len(block_ids)))
                table_values.extend(block_ids[first:])
                self._sent[row] = (block_ids, len(block_ids))
        flat = upload(np.concatenate([rows.ravel(), np.array(table_at + table_values, np.int64)]), self._pool.device)
        self._rows[:, :size].copy_(flat[: 4 * size].view(4, size))
        if table_at:
            at, values = flat[4 * size :].view(2, -1)
            self._tables.view(-1).index_copy_(0, at, values)

    def _capture_all(self) -> None:
        """Largest first, so that the smaller graphs fit into the memory of the larger."""
        started_s = time.monotonic()
        memory = torch.cuda.graph_pool_handle()
        for count, size in enumerate(reversed(self._sizes), start=1):
            self._captured[size] = self._capture(size, memory)
            if count % 8 == 0 or count == len(self._sizes):
                log.info("captured %d of %d CUDA graphs, %.1f s", count, len(self._sizes), time.monotonic() - started_s)

    def _capture(self, size: int, memory: Any) -> _Captured:
        step = self._step(size)
        # Kernels compile and libraries allocate on their first run, which must not be the captured one.
        self._run(step)
        torch.cuda.synchronize(self._pool.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory):
            logits, tokens = self._run(step)
        return _Captured(graph, logits, tokens)

    def _run(self, step: StepInput) -> tuple[Tensor, Tensor]:
        logits = self._decoder.logits(self._decoder.forward(step, self._pool))
        return logits, logits.argmax(dim=-1)

    def _step(self, size: int) -> StepInput:
        rows = self._rows[:, :size]
        batch = PagedBatch([1] * size, [1] * size, self._starts[: size + 1], rows[_LENGTH], self._tables[:size])
        order = list(range(size))
        return StepInput(rows[_TOKEN], rows[_POSITION], rows[_SLOT], batch, order, [row + 1 for row in order])

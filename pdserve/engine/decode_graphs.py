"""Decode steps as CUDA graphs: one launch instead of some four hundred.

Owns the graphs, one for each captured batch size, and the tensors they read and write. A step of n sequences, each with
one new token, replays the smallest graph that holds n; the rows past n are padding, whose KV slot of -1 is written
nowhere and whose sequence length of 0 is attended over nothing. Block tables stay on the device between steps and only
what changed is sent. A row's token comes from the host, or from what the step before has sampled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from pd_kernels import sampling
from pd_kernels.paged_attention import PagedBatch
from pdserve.config import CudaGraphConfig
from pdserve.engine.host_step import LENGTH, PADDING, POSITION, PREVIOUS, SLOT, TOKEN, GraphStep
from pdserve.engine.layers.step_input import StepInput, upload
from pdserve.engine.models.decoder import Decoder

log = logging.getLogger(__name__)


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
        last_tokens: what the newest step has sampled, by its items; read by every replay.
        sizes: batch sizes to capture, ascending.
        max_blocks: blocks of the longest sequence.
    """

    def __init__(
        self, decoder: Decoder, pool: Tensor, last_tokens: Tensor, sizes: Sequence[int], max_blocks: int
    ) -> None:
        self._decoder = decoder
        self._pool = pool
        self._last_tokens = last_tokens
        self._sizes = sizes
        largest = sizes[-1]
        self._rows = torch.empty((len(PADDING), largest), dtype=torch.int64, device=pool.device)
        self._rows.copy_(upload(np.repeat(PADDING[:, None], largest, axis=1), pool.device))
        self._tables = torch.zeros((largest, max_blocks), dtype=torch.int64, device=pool.device)
        self._starts = torch.arange(largest + 1, device=pool.device)
        self._captured: dict[int, _Captured] = {}
        self._capture_all()

    def replay(self, step: GraphStep) -> tuple[Tensor, Tensor]:
        """Logits [num_items, vocab_size] and their argmax [num_items]; valid until the next replay."""
        num_rows = len(PADDING) * step.size
        flat = upload(step.values, self._pool.device)
        self._rows[:, : step.size].copy_(flat[:num_rows].view(-1, step.size))
        if len(flat) > num_rows:
            at, values = flat[num_rows:].view(2, -1)
            self._tables.view(-1).index_copy_(0, at, values)
        captured = self._captured[step.size]
        captured.graph.replay()
        return captured.logits[: step.num_items], captured.tokens[: step.num_items]

    def release(self) -> None:
        """Destroy the graphs."""
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def _capture_all(self) -> None:
        """Largest first, so that the smaller graphs fit into the memory of the larger."""
        started_s = time.monotonic()
        memory = torch.cuda.graph_pool_handle()
        # The bar is for a terminal; a worker's log gets the line at the end.
        for size in tqdm(self._sizes[::-1], desc="capturing CUDA graphs", unit="graph", leave=False, disable=None):
            self._captured[size] = self._capture(size, memory)
        log.info("captured %d CUDA graphs in %.1f s", len(self._sizes), time.monotonic() - started_s)

    def _capture(self, size: int, memory: Any) -> _Captured:
        # Kernels compile and libraries allocate on their first run, which must not be the captured one.
        self._run(size)
        torch.cuda.synchronize(self._pool.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: NCCL's looks at its events.
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits, tokens = self._run(size)
        return _Captured(graph, logits, tokens)

    def _run(self, size: int) -> tuple[Tensor, Tensor]:
        rows = self._rows[:, :size]
        previous = rows[PREVIOUS]
        sampled = self._last_tokens.index_select(0, previous.clamp(min=0))
        token_ids = torch.where(previous < 0, rows[TOKEN], sampled)
        batch = PagedBatch([1] * size, [1] * size, self._starts[: size + 1], rows[LENGTH], self._tables[:size])
        step = StepInput(token_ids, rows[POSITION], rows[SLOT], batch)
        logits = self._decoder.logits(self._decoder.forward(step, self._pool))
        tokens = sampling.sample(logits, None, None, None, None, None) if len(logits) else self._last_tokens[:0]
        return logits, tokens

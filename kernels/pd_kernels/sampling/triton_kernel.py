"""Sampling in Triton: thresholds found without sorting, and a draw that reads one chunk of its row.

A row is cut into chunks. A program reads one and leaves a few numbers of it, which the next kernel adds up: the scan,
the search for top-k's threshold and for top-p's, min-p, the draw. Chunks depend on the vocabulary's size alone, nothing
is added up by atomics, and each kernel is compiled once for batches of any size, so a row's token depends on nothing
but the row. A row that does not ask for a filter, or is greedy, returns from that kernel at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pd_kernels.sampling.draw_kernels import draw_kernel, min_p_kernel, scan_kernel
from pd_kernels.sampling.search_kernels import collect_kernel, decide_kernel, narrow_kernel

# Measured on one H200 with a vocabulary of 128256 (docs/log.md).
_BLOCK, _NUM_WARPS = 4096, 4
_NUM_PIVOTS, _NUM_LEVELS = 16, 2
_DECIDE_TILE, _DECIDE_WARPS = 4096, 8


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows to sample, how they are cut, and what the scan found in their chunks; thresholds begin at -inf."""

    logits: Tensor
    temperature: Tensor | None
    peaks: Tensor
    sums: Tensor
    lowest: Tensor
    best: Tensor
    thresholds: Tensor
    block: int
    is_aligned: bool

    @classmethod
    def scan(cls, logits: Tensor, temperature: Tensor | None, block: int) -> _Rows:
        (num_rows, vocab_size), device = logits.shape, logits.device
        num_chunks = triton.cdiv(vocab_size, block)
        peaks, sums, lowest = torch.empty((3, num_rows, num_chunks), dtype=torch.float32, device=device).unbind()
        best = torch.empty((num_rows, num_chunks), dtype=torch.int32, device=device)
        thresholds = torch.empty(num_rows, dtype=torch.float32, device=device)
        rows = cls(logits, temperature, peaks, sums, lowest, best, thresholds, block, _is_aligned(logits))
        scan_kernel[rows.grid](
            logits, temperature, peaks, lowest, sums, best, thresholds, logits.stride(0), vocab_size,
            ALIGNED=rows.is_aligned, BLOCK=block, num_warps=_NUM_WARPS,
        )  # fmt: skip
        return rows

    @property
    def grid(self) -> tuple[int, int]:
        """A program for each chunk."""
        return self.peaks.shape[1], self.peaks.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.logits.stride(0), self.logits.shape[1], self.peaks.shape[1]

    @property
    def tiles(self) -> dict[str, int]:
        """Compile-time constants of the kernels that add chunks up."""
        padded_chunks = int(triton.next_power_of_2(self.peaks.shape[1]))
        return {"CHUNKS": padded_chunks, "ALIGNED": self.is_aligned, "BLOCK": self.block, "num_warps": _NUM_WARPS}


def sample(
    logits: Tensor, temperature: Tensor | None, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None,
    number: Tensor | None, out: Tensor, block: int = _BLOCK,
) -> Tensor:  # fmt: skip
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError("rows of logits must be dense")
    if not len(logits):
        return out
    rows = _Rows.scan(logits, temperature, block)
    if temperature is not None:
        if top_k is not None:
            _search(rows, top_k, is_count=True)
        if top_p is not None:
            _search(rows, top_p, is_count=False)
        if min_p is not None:
            min_p_kernel[rows.grid](
                logits, temperature, min_p, rows.peaks, rows.sums, rows.thresholds, *rows.sizes, **rows.tiles
            )
    draw_kernel[(len(logits),)](
        logits, temperature, min_p, number, rows.peaks, rows.sums, rows.best, rows.thresholds, out,
        *rows.sizes, **rows.tiles,
    )  # fmt: skip
    return out


def _search(rows: _Rows, limit: Tensor, is_count: bool) -> None:
    """Raise thresholds to what top-k (`is_count`) or top-p asks, and leave out of the sums what is below them."""
    logits, temperature, (num_chunks, num_rows) = rows.logits, rows.temperature, rows.grid

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    intervals = new(_NUM_LEVELS + 1, num_rows, 3).unbind()
    pivots = new(_NUM_LEVELS, num_rows, _NUM_PIVOTS).unbind()
    reached = new(_NUM_LEVELS, num_rows, num_chunks, _NUM_PIVOTS).unbind()
    constants = {"COUNT": is_count, "NUM_PIVOTS": _NUM_PIVOTS, **rows.tiles}
    before: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
    for level in range(_NUM_LEVELS):
        narrow_kernel[rows.grid](
            logits, temperature, limit, rows.peaks, rows.lowest, rows.sums, rows.thresholds,
            *before, intervals[level], pivots[level], reached[level], *rows.sizes, **constants,
        )  # fmt: skip
        before = (intervals[level], pivots[level], reached[level])
    listed, num_listed = new(num_rows, num_chunks, rows.block), new(num_rows, num_chunks, dtype=torch.int32)
    num_above, sum_above = new(2, num_rows, num_chunks).unbind()
    collect_kernel[rows.grid](
        logits, temperature, limit, rows.peaks, *before, intervals[-1],
        listed, num_listed, num_above, sum_above, *rows.sizes, **constants,
    )  # fmt: skip
    chunks = rows.tiles["CHUNKS"]
    decide_kernel[(num_rows,)](
        temperature, limit, rows.peaks, rows.sums, rows.thresholds,
        intervals[-1], listed, num_listed, num_above, sum_above, *rows.sizes[1:],
        COUNT=is_count, SLOTS=max(16, _DECIDE_TILE // chunks), CHUNKS=chunks, BLOCK=rows.block,
        num_warps=_DECIDE_WARPS,
    )  # fmt: skip


def _is_aligned(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, which only the vocabulary's size may decide.

    It changes how threads share out a chunk, and with that the last bit of its sums, so nothing that varies between
    batches may change it. Raises ValueError if the rows could be aligned but aren't.
    """
    if logits.shape[1] * logits.element_size() % 16:
        return False
    if logits.data_ptr() % 16 or logits.stride(0) * logits.element_size() % 16:
        raise ValueError("rows of logits must begin at multiples of 16 bytes")
    return True

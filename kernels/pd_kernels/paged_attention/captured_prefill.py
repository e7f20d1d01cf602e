"""The attention of prefills inside a CUDA graph: launches of a fixed size, over tables that the graph makes itself.

All attend over what the cache holds, their own tokens included, laid out in dense rows. Which tiles there are follows
from the sequences' spans by arithmetic on the device, so that a replay takes others with nothing told but those. Tiles
that are left over are empty, and their programs end at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_kernels.paged_attention.batch import PrefillRoom
from pd_kernels.paged_attention.layout import GATHER_TOKENS, KvRows
from pd_kernels.paged_attention.prefill_kernel import attend, gather, tile_tokens
from pd_kernels.paged_attention.spec import AttentionSpec


class CapturedPrefill:
    """The prefills in `room`, for any layer.

    Args:
        pool: see `pd_kernels.paged_attention.plan`.
        dtype: of the queries.
    """

    def __init__(self, room: PrefillRoom, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> None:
        self._spec, self._pool, self._block_tables = spec, pool, room.block_tables
        first_rows, num_tokens, num_cached = room.spans.unbind(1)
        lengths = torch.where(num_tokens > 0, num_cached + num_tokens, 0)
        kept = lengths if spec.window is None else torch.minimum(lengths, num_tokens + (spec.window - 1))
        gathered = _Pieces(kept, GATHER_TOKENS, room.max_context // GATHER_TOKENS)
        padded = -(-kept // GATHER_TOKENS) * GATHER_TOKENS
        gathered_at, kv_rows = gathered.at, padded.cumsum(0) - padded
        if spec.window is not None:
            # What no new token sees is not laid out, and a tile's row is that of key 0.
            gathered_at, kv_rows = gathered_at + gathered.of(lengths - kept), kv_rows - (lengths - kept)
        self._gathered = gathered.table(gathered.seq, gathered_at, gathered.of(lengths))
        width = tile_tokens(spec.group)
        tiles = _Pieces(num_tokens, width, room.max_tokens // width + len(room.spans))
        self._tiles = tiles.table(
            tiles.of(first_rows) + tiles.at,
            (tiles.of(num_tokens) - tiles.at).clamp(max=width),
            tiles.of(num_cached) + tiles.at + 1,
            tiles.of(kv_rows),
        )
        self._kv = KvRows.empty(room.max_context, spec, pool.new_empty(0, dtype=dtype))

    def run(self, qkv: Tensor, layer: int, out: Tensor) -> None:
        """Fill the prefills' rows of `out`, [num_rows, num_heads * head_dim]."""
        gather(self._pool, layer, self._block_tables, self._gathered, self._kv)
        attend(qkv, self._kv, self._tiles, self._spec, layer, out)


class _Pieces:
    """Sequences of `lengths`, cut into pieces of `size`, with room for `most`: each one's sequence, and its start."""

    def __init__(self, lengths: Tensor, size: int, most: int) -> None:
        counts = -(-lengths // size)
        ends = counts.cumsum(0)
        pieces = torch.arange(most, device=lengths.device)
        self._is_there = (pieces < ends[-1])[:, None]
        self.seq = torch.searchsorted(ends, pieces, right=True).clamp(max=len(lengths) - 1)
        self.at = (pieces - self.of(ends - counts)) * size

    def of(self, values: Tensor) -> Tensor:
        """Each piece's sequence's value."""
        return values.index_select(0, self.seq)

    def table(self, *columns: Tensor) -> Tensor:
        """int32 [most, 4]: these columns, zeros elsewhere."""
        rows = torch.stack([*columns, *[torch.zeros_like(self.seq)] * (4 - len(columns))], 1)
        return torch.where(self._is_there, rows, 0).to(torch.int32)

"""Copies pieces of sequences between the pool and staging, in order with what the engine computes.

On a GPU the copies run on a stream of their own. Each copy returns a `Mark` on that stream, which is reached when the
copy is made. `mark` makes one on the engine's stream, and is called in the engine's thread.

Life cycle: made → `bind`, in the transceiver's thread. All calls but `mark` are made in that thread.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kv_transfer.layout import CONVERTIBLE, GroupLayout, KvPoolView, Span
from kv_transfer.mark_poller import Mark
from kv_transfer.pieces import Piece, num_blocks
from kv_transfer.routes import Packing, Share
from pd_kernels.kv_pack import (
    BlockReader,
    ForeignPool,
    KvSlice,
    block_reader,
    pack_blocks,
    pack_slice,
    pool_with_margins,
    read_margins,
    unpack_blocks,
    unpack_slice,
)

PROBE_BYTES = 65536
"""How many bytes of each end of a message a probe reads."""


class Destination(NamedTuple):
    """Where a piece of a sequence is copied to: the sequence's blocks, not before the mark `after`."""

    block_table: Tensor
    piece: Piece
    after: Mark


class BlockCopier:
    """Packs and unpacks pieces of `pool`."""

    def __init__(self, pool: KvPoolView) -> None:
        self._pools = [group.tensor for group in pool.groups]
        self._layouts = pool.layout.groups
        self._device = pool.device
        self._cuda = pool.is_cuda
        self._stream: Any = None
        self._side_stream: Any = None

    def bind(self) -> None:
        """Belong to the calling thread, whose copies get a stream of their own."""
        if self._cuda:
            new_stream: Any = torch.cuda.Stream
            torch.cuda.set_device(self._device)
            self._stream = new_stream(self._device, priority=-1)
            self._side_stream = new_stream(self._device, priority=-1)
            torch.cuda.set_stream(self._stream)

    def mark(self) -> Mark:
        """This point of the calling thread's current stream. From any thread."""
        return torch.cuda.current_stream(self._device).record_event() if self._cuda else None

    def block_table(self, block_ids: Sequence[int]) -> Tensor:
        """`block_ids` as a tensor for the kernels: int64 `[n]` on the pool's device."""
        return torch.tensor(block_ids, dtype=torch.int64).to(self._device, non_blocking=True)

    def pack(self, block_table: Tensor, piece: Piece, packing: Packing, payload: Tensor) -> Mark:
        """Copy `piece` of a sequence into `payload`, uint8 `[packing.nbytes(piece)]`. Returns the mark of its end."""
        if packing.whole_blocks:
            pool = self._pools[piece.group]
            pack_blocks(pool, self._blocks(block_table, piece), payload, *self._layers(piece))
        else:
            packed, part = self._slice(piece, packing, payload)
            pack_slice(self._pools[piece.group], block_table, part, packed)
        return self._stream.record_event() if self._cuda else None

    def unpack(self, payload: Tensor, block_table: Tensor, piece: Piece, packing: Packing, after: Mark) -> Mark:
        """Copy `payload` into a sequence's blocks, not before `after`. Returns the mark of its end."""
        if after is not None:
            self._stream.wait_event(after)
        if packing.whole_blocks:
            pool = self._pools[piece.group]
            unpack_blocks(payload, self._blocks(block_table, piece), pool, *self._layers(piece))
        else:
            packed, part = self._slice(piece, packing, payload)
            unpack_slice(packed, block_table, part, self._pools[piece.group])
        return self._stream.record_event() if self._cuda else None

    def reader(self, source: ForeignPool, group: int) -> BlockReader:
        """Makes the reader that copies from `source` into the pool of cache group `group`. Its kernel is loaded here,
        by an empty read, so that no handoff waits for that."""
        reader, nothing = block_reader(source, self._pools[group]), self.block_table(())
        reader.read(nothing, 0, nothing, 0, 0)
        return reader

    def read(self, reader: BlockReader, source_table: Tensor, source_layers: Span, to: Destination) -> Mark:
        """Copy a piece out of another pool, in whole blocks. Returns the mark of its end.

        Args:
            source_table: the blocks of the sequence in the other pool.
            source_layers: which layers of the group the other pool holds.
            to: the piece, and where it goes.
        """
        block_table, piece, after = to
        if after is not None:
            self._stream.wait_event(after)
        layer, num_layers = self._layers(piece)
        source_layer = piece.layers.first - source_layers.first
        theirs = self._blocks(source_table, piece)
        reader.read(theirs, source_layer, self._blocks(block_table, piece), layer, num_layers)
        return self._stream.record_event() if self._cuda else None

    def read_margins(self, address: int, nbytes: int) -> tuple[Tensor, Mark]:
        """What stands in the margins of a pool of `nbytes` at `address`, on the host once the mark is reached. Not
        behind the copies of handoffs, which may wait for the engine."""
        if not self._cuda:
            return read_margins(address, nbytes, self._device), None
        with torch.cuda.stream(self._side_stream):
            found = read_margins(address, nbytes, self._device).to("cpu", non_blocking=True)
            return found, self._side_stream.record_event()

    def probe(self, payload: Tensor) -> int:
        """CRC-32 of both ends of `payload`, which nobody writes to. Takes some 0.1 ms, which one message of a
        connection may."""
        with torch.cuda.stream(self._side_stream) if self._cuda else contextlib.nullcontext():
            return checksum(torch.cat((payload[:PROBE_BYTES], payload[-PROBE_BYTES:])))

    def checksum_of(self, block_table: Tensor, piece: Piece) -> int:
        """CRC-32 of the blocks that `piece` is in, as they are in the pool. For debugging only."""
        first, num_layers = self._layers(piece)
        blocks = self._pools[piece.group].view(torch.uint8).index_select(0, self._blocks(block_table, piece))
        return checksum(blocks[:, first : first + num_layers].contiguous().view(-1))

    def warm_up(self, staging: Tensor, unpacks: bool) -> None:
        """Compile the kernels that pack, or those that unpack, so that no handoff waits for that. `staging` has room
        for a block of any group; the pools are left alone."""
        pools = self._pools
        self._pools = [torch.zeros_like(pool[:1]) for pool in pools]
        for group, layout in enumerate(self._layouts):
            if layout.layers.size:
                self._warm_up_group(group, layout, staging, unpacks)
        self._pools = pools
        if unpacks:
            for group, (pool, layout) in enumerate(zip(pools, self._layouts, strict=True)):
                if layout.layers.size:
                    self.reader(ForeignPool(pool.data_ptr(), pool.shape[0], layout.layers.size), group)
            aligned = pool_with_margins((16,), torch.uint8, self._device)
            self.read_margins(aligned.data_ptr(), aligned.numel())

    def _warm_up_group(self, group: int, mine: GroupLayout, staging: Tensor, unpacks: bool) -> None:
        held, whole = Share(mine.layers, mine.kv_heads), Span(0, mine.tokens_per_block)
        dtypes = sorted({mine.dtype, *(CONVERTIBLE if mine.dtype in CONVERTIBLE else ())})
        dtypes = [dtype for dtype in dtypes if _dtype(dtype).itemsize <= _dtype(mine.dtype).itemsize]
        packings = [(Packing(held, True, mine.dtype, mine.tokens_per_block, 0), whole)]
        packings += [(Packing(held, False, dtype, 1, 0), Span(0, 1)) for dtype in dtypes]
        table = self.block_table((0,))
        for packing, tokens in packings:
            values = self._pools[group][0, :, :, :, : tokens.size].numel()
            payload = staging[: values * _dtype(packing.dtype).itemsize]
            piece = Piece(mine.layers, tokens, group)
            if unpacks:
                self.unpack(payload, table, piece, packing, None)
            else:
                self.pack(table, piece, packing, payload)

    def _blocks(self, block_table: Tensor, piece: Piece) -> Tensor:
        size = self._layouts[piece.group].tokens_per_block
        first, end = piece.tokens.first // size, num_blocks(piece.tokens.end, size)
        return block_table if (first, end) == (0, len(block_table)) else block_table[first:end]

    def _layers(self, piece: Piece) -> tuple[int, int]:
        return piece.layers.first - self._layouts[piece.group].layers.first, piece.layers.size

    def _slice(self, piece: Piece, packing: Packing, payload: Tensor) -> tuple[Tensor, KvSlice]:
        layout, kv_heads = self._layouts[piece.group], packing.share.kv_heads
        head, heads = kv_heads.first - layout.kv_heads.first, kv_heads.size
        layer, layers = self._layers(piece)
        token, tokens = piece.tokens.first, piece.tokens.size
        packed = payload.view(_dtype(packing.dtype)).view(layers, layout.kv_factor, heads, tokens, layout.head_dim)
        return packed, KvSlice(layer, layers, head, heads, token, tokens)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def checksum(payload: Tensor) -> int:
    """CRC-32 of `payload`; copies it to the host first, so for debugging only."""
    return zlib.crc32(payload.cpu().numpy().data)

"""Copies pieces of sequences between the pool and staging, in order with what the engine computes.

On a GPU the copies run on a stream of their own. A `Mark` is a point on a stream: what was launched before it has run
once the mark is reached. Marks of the engine's stream are taken in the engine's thread. On a CPU everything before has
already happened, and a mark is None.

Life cycle: made → `bind`, in the transceiver's thread, which all other calls but `mark` belong to.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kv_transfer.layout import CONVERTIBLE, KvPoolView, Span
from kv_transfer.plan import Piece, num_blocks
from kv_transfer.reshard import Join, Share, held_by
from pd_kernels.kv_pack import (
    ForeignPool,
    KvSlice,
    pack_blocks,
    pack_slice,
    read_blocks,
    unpack_blocks,
    unpack_slice,
)

log = logging.getLogger(__name__)

SPIN_S = 0.0003
"""Copies take tens of microseconds: polling that long beats sleeping, whose grain is a millisecond."""

PAUSE_S = 0.00005
"""Between two looks while something is due, but not just now: each takes the interpreter lock, which the engine's
thread wants as well."""

NEAR_S = 0.00015
"""A pause lasts up to twice as long as asked for: none so shortly before something is due."""

LATE_S = 0.001
"""Others may share the link."""

SLEEP_S = 0.001


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def query(self) -> bool: ...


Mark = DeviceEvent | None
Then = Callable[[Exception | None], None]


class Target(NamedTuple):
    """Where a piece of a sequence belongs, and what it must not come before."""

    block_table: Tensor
    piece: Piece
    after: Mark


class BlockMover:
    """Packs and unpacks pieces of `pool`."""

    def __init__(self, pool: KvPoolView) -> None:
        self._pool = pool.tensor
        self._layout = pool.layout
        self._device = pool.tensor.device
        self._cuda = self._device.type == "cuda"
        self._stream: Any = None
        self._loop: asyncio.AbstractEventLoop
        self._waiting: list[tuple[DeviceEvent, Then]] = []
        self._polling = False
        self._moved_at_s = 0.0
        self._awake: dict[object, float] = {}

    def bind(self) -> None:
        """Belong to the running loop and its thread, whose copies get a stream of their own."""
        self._loop = asyncio.get_running_loop()
        if self._cuda:
            new_stream: Any = torch.cuda.Stream
            torch.cuda.set_device(self._device)
            self._stream = new_stream(self._device, priority=-1)
            torch.cuda.set_stream(self._stream)

    def mark(self) -> Mark:
        """This point of the calling thread's current stream. From any thread."""
        return torch.cuda.current_stream(self._device).record_event() if self._cuda else None

    def when(self, mark: Mark, then: Then) -> None:
        """Call `then` once `mark` is reached: at once if there is none, else soon. It gets what the device says if it
        has failed. The device bounds this wait: a kernel that never ends can't be taken back."""
        if mark is None:
            then(None)
            return
        self._waiting.append((mark, then))
        self._start_polling()

    def stay_awake(self, owner: object, seconds: float) -> None:
        """What `owner` waits for takes `seconds`, after what others wait for: a thread that sleeps is late for it.
        Until `rest`, or `LATE_S` after that. Does nothing without a GPU, where nothing is that quick."""
        if self._cuda:
            self._awake[owner] = max(time.monotonic(), *self._awake.values(), 0.0) + seconds
            self._start_polling()

    def rest(self, owner: object) -> None:
        """It is here."""
        self._awake.pop(owner, None)

    def block_table(self, block_ids: Sequence[int]) -> Tensor:
        """`block_ids` where the kernels want them: int64 `[n]` on the pool's device."""
        return torch.tensor(block_ids, dtype=torch.int64).to(self._device, non_blocking=True)

    def pack(self, block_table: Tensor, piece: Piece, join: Join, payload: Tensor) -> Mark:
        """Copy `piece` of a sequence into `payload`, uint8 `[join.nbytes(piece)]`. Done once the mark is reached."""
        if join.whole_blocks:
            pack_blocks(self._pool, self._blocks(block_table, piece), payload, *self._layers(piece))
        else:
            packed, part = self._slice(piece, join, payload)
            pack_slice(self._pool, block_table, part, packed)
        return self._stream.record_event() if self._cuda else None

    def unpack(self, payload: Tensor, block_table: Tensor, piece: Piece, join: Join, after: Mark) -> Mark:
        """Copy `payload` into a sequence's blocks, not before `after`. Done once the mark is reached."""
        if after is not None:
            self._stream.wait_event(after)
        if join.whole_blocks:
            unpack_blocks(payload, self._blocks(block_table, piece), self._pool, *self._layers(piece))
        else:
            packed, part = self._slice(piece, join, payload)
            unpack_slice(packed, block_table, part, self._pool)
        return self._stream.record_event() if self._cuda else None

    def read(self, source: ForeignPool, source_table: Tensor, source_layers: Span, to: Target) -> Mark:
        """Copy a piece of a sequence, whole blocks of `source_layers` of another pool, which `source_table` names, into
        a sequence's blocks. Done once the mark is reached."""
        block_table, piece, after = to
        if after is not None:
            self._stream.wait_event(after)
        theirs, ours = self._blocks(source_table, piece), self._blocks(block_table, piece)
        source_layer = piece.layers.first - source_layers.first
        read_blocks(source, theirs, source_layer, self._pool, ours, *self._layers(piece))
        return self._stream.record_event() if self._cuda else None

    def rehearse_read(self, source: ForeignPool, source_table: Tensor) -> None:
        """Read no block, as `read` reads many: code that runs for the first time in milliseconds takes 40 us longer."""
        if self._cuda:
            none = source_table[:0]
            read_blocks(source, none, 0, self._pool, none, 0, self._layout.layers.size)
            self._stream.record_event()

    def checksum_of(self, block_table: Tensor, piece: Piece) -> int:
        """CRC-32 of the blocks that `piece` is in, as they are in the pool. For debugging only."""
        first, num_layers = self._layers(piece)
        blocks = self._pool.view(torch.uint8).index_select(0, self._blocks(block_table, piece))
        return checksum(blocks[:, first : first + num_layers].contiguous().view(-1))

    def warm_up(self, staging: Tensor, unpacks: bool) -> None:
        """Compile the kernels that pack, or those that unpack, so that no handoff waits for that. `staging` has room
        for a block; the pool is left alone."""
        mine, scratch = self._layout, torch.zeros_like(self._pool[:1])
        whole = Span(0, mine.tokens_per_block)
        dtypes = sorted({mine.dtype, *(CONVERTIBLE if mine.dtype in CONVERTIBLE else ())})
        dtypes = [dtype for dtype in dtypes if _dtype(dtype).itemsize <= _dtype(mine.dtype).itemsize]
        joins = [(Join(held_by(mine), True, mine.dtype, mine.tokens_per_block, 0), whole)]
        joins += [(Join(held_by(mine), False, dtype, 1, 0), Span(0, 1)) for dtype in dtypes]
        table, pool, self._pool = self.block_table((0,)), self._pool, scratch
        for join, tokens in joins:
            values = scratch[0, :, :, :, : tokens.size].numel()
            payload = staging[: values * _dtype(join.dtype).itemsize]
            if unpacks:
                self.unpack(payload, table, Piece(mine.layers, tokens), join, None)
            else:
                self.pack(table, Piece(mine.layers, tokens), join, payload)
        if unpacks:
            source = ForeignPool(pool.data_ptr(), pool.shape[0], mine.layers.size)
            self.read(source, table, mine.layers, Target(table, Piece(mine.layers, whole), None))
        self._pool = pool

    def _blocks(self, block_table: Tensor, piece: Piece) -> Tensor:
        size = self._layout.tokens_per_block
        first, end = piece.tokens.first // size, num_blocks(piece.tokens.end, size)
        return block_table if (first, end) == (0, len(block_table)) else block_table[first:end]

    def _layers(self, piece: Piece) -> tuple[int, int]:
        return piece.layers.first - self._layout.layers.first, piece.layers.size

    def _slice(self, piece: Piece, join: Join, payload: Tensor) -> tuple[Tensor, KvSlice]:
        share: Share = join.share
        head, heads = share.kv_heads.first - self._layout.kv_heads.first, share.kv_heads.size
        layer, layers = self._layers(piece)
        token, tokens = piece.tokens.first, piece.tokens.size
        shape = (layers, self._layout.kv_factor, heads, tokens, self._layout.head_dim)
        packed = payload.view(_dtype(join.dtype)).view(shape)
        return packed, KvSlice(layer, layers, head, heads, token, tokens)

    def _start_polling(self) -> None:
        if not self._polling:
            self._polling = True
            self._moved_at_s = time.monotonic()
            self._loop.call_soon(self._poll)

    def _poll(self) -> None:
        waiting, self._waiting = self._waiting, []
        for mark, then in waiting:
            try:
                reached, error = mark.query(), None
            except RuntimeError as failure:
                log.error("the device has failed: %s", failure)
                reached, error = True, failure
            if reached:
                self._moved_at_s = time.monotonic()
                self._loop.call_soon(then, error)
            else:
                self._waiting.append((mark, then))
        now_s = time.monotonic()
        self._awake = {owner: due_s for owner, due_s in self._awake.items() if now_s < due_s + LATE_S}
        self._polling = bool(self._waiting or self._awake)
        if not self._polling:
            return
        due = any(-SPIN_S < due_s - now_s < NEAR_S for due_s in self._awake.values())
        if due or now_s - self._moved_at_s < SPIN_S:
            self._loop.call_soon(self._poll)
        elif self._awake:
            time.sleep(PAUSE_S)
            self._loop.call_soon(self._poll)
        else:
            self._loop.call_later(SLEEP_S, self._poll)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]


def checksum(payload: Tensor) -> int:
    """CRC-32 of `payload`; copies it to the host first, so for debugging only."""
    return zlib.crc32(payload.cpu().numpy().data)

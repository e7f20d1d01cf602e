"""Copies blocks between the pool and staging, in order with what the engine computes.

On a GPU the copies run on a stream of their own. A `Mark` is a point on the engine's stream, taken in the engine's
thread: what was launched before it has run once the mark is reached. On a CPU everything before has already happened,
and a mark is None.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from kv_transfer.layout import KvPoolView
from pd_kernels.kv_pack import pack_blocks, unpack_blocks

SPIN_S = 0.0003
"""Copies take tens of microseconds: polling that long beats sleeping, whose grain is a millisecond."""

SLEEP_S = 0.001


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def query(self) -> bool: ...


Mark = DeviceEvent | None


class BlockMover:
    """Packs and unpacks blocks of `pool`. Its coroutines belong to the transceiver's loop, `mark` to any thread."""

    def __init__(self, pool: KvPoolView) -> None:
        self._pool = pool.tensor
        self._device = pool.tensor.device
        self._cuda = self._device.type == "cuda"
        new_stream: Any = torch.cuda.Stream
        self._stream: Any = new_stream(self._device, priority=-1) if self._cuda else None

    def mark(self) -> Mark:
        """This point of the calling thread's current stream."""
        return torch.cuda.current_stream(self._device).record_event() if self._cuda else None

    async def reached(self, mark: Mark) -> None:
        """Wait until everything before `mark` has run. The device bounds this wait: a kernel that never ends can't be
        taken back, and its blocks are not free before."""
        if mark is None:
            return
        started_s = time.monotonic()
        while not mark.query():  # noqa: ASYNC110 (torch offers no callback)
            await asyncio.sleep(0 if time.monotonic() - started_s < SPIN_S else SLEEP_S)

    def block_ids(self, block_ids: Sequence[int]) -> Tensor:
        """`block_ids` where the kernels want them: int64 `[n]` on the pool's device."""
        with self._on_stream():
            return torch.tensor(block_ids, dtype=torch.int64).to(self._device)

    async def pack(self, block_ids: Tensor, payload: Tensor) -> None:
        """Copy blocks into `payload`; on return they have been read."""
        with self._on_stream():
            pack_blocks(self._pool, block_ids, payload)
            done = self.mark()
        await self.reached(done)

    async def unpack(self, payload: Tensor, block_ids: Tensor, after: Mark) -> None:
        """Copy `payload` into blocks, not before `after`; on return they have been written."""
        with self._on_stream():
            if after is not None:
                self._stream.wait_event(after)
            unpack_blocks(payload, block_ids, self._pool)
            done = self.mark()
        await self.reached(done)

    async def warm_up(self, payload: Tensor) -> None:
        """Compile the kernels, so that no handoff waits for that. Block 0 is read and written back as it was."""
        first = self.block_ids((0,))
        await self.pack(first, payload)
        await self.unpack(payload, first, self.mark())

    def _on_stream(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = torch.cuda.stream(self._stream) if self._cuda else nullcontext()
        return context


def checksum(payload: Tensor) -> int:
    """CRC-32 of `payload`; copies it to the host first, so for debugging only."""
    return zlib.crc32(payload.cpu().numpy().data)

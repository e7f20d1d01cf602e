"""Pools with a margin before their first block and after their last, where no KV is ever written.

Who reads a pool through a mapping of its memory can first read what its owner has written there, at both ends, by the
same kernel: on some hosts a mapping succeeds and returns something else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MARGIN_BYTES = 512
"""Leaves the first block as aligned as the allocation is."""


def pool_with_margins(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A contiguous pool of zeros of `shape`, with margins."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.zeros(nbytes + 2 * MARGIN_BYTES, dtype=torch.uint8, device=device)
    return memory[MARGIN_BYTES : MARGIN_BYTES + nbytes].view(dtype).view(*shape)


def margins(pool: Tensor) -> tuple[Tensor, Tensor] | None:
    """The margins before and after `pool`, uint8 `[MARGIN_BYTES]`; None if it has none, or is a part of more."""
    storage = pool.untyped_storage()
    first = pool.storage_offset() * pool.element_size()
    end = first + pool.numel() * pool.element_size()
    if first != MARGIN_BYTES or storage.nbytes() != end + MARGIN_BYTES:
        return None
    memory = torch.empty(0, dtype=torch.uint8, device=pool.device).set_(storage)
    return memory[first - MARGIN_BYTES : first], memory[end : end + MARGIN_BYTES]

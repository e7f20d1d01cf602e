"""Pack and unpack in torch: the oracle of the kernel, and what CPU pools use."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_rows(rows: Tensor, row_ids: Tensor, packed: Tensor) -> None:
    """`packed[i] = rows[row_ids[i]]`. `rows` is `[num_rows, row_words]`, `packed` `[n, row_words]`."""
    torch.index_select(rows, 0, row_ids, out=packed)


def unpack_rows(packed: Tensor, row_ids: Tensor, rows: Tensor) -> None:
    """`rows[row_ids[i]] = packed[i]`."""
    rows.index_copy_(0, row_ids, packed)

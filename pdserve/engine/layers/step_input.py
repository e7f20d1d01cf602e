"""A step's tensors: what the scheduler's items look like to the model.

Built once a step on the host and sent to the device in one copy. The items are reordered, decodes first and longest
first, because that is the order attention wants; `order` says which item stands where.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch
from pdserve.engine.batch import BatchItem

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, packed without padding: token i of the step is at `positions[i]` and writes its KV to `slots[i]`.

    `order[i]` is the index of the item whose tokens come i-th; they end before token `ends[i]`.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    batch: PagedBatch
    order: list[int]
    ends: list[int]


def build(items: Sequence[BatchItem], tokens_per_block: int, device: torch.device) -> StepInput:
    """Pack `items`, each with at least one token."""
    order = sorted(range(len(items)), key=lambda index: (len(items[index].token_ids) > 1, -items[index].start))
    ordered = [items[index] for index in order]
    q_lens = [len(item.token_ids) for item in ordered]
    seq_lens = [item.start + q_len for item, q_len in zip(ordered, q_lens, strict=True)]
    q_starts = np.concatenate(([0], np.cumsum(q_lens)))
    tables = _block_tables(ordered, seq_lens, tokens_per_block)
    token_ids = np.fromiter((token for item in ordered for token in item.token_ids), np.int64, int(q_starts[-1]))
    owners = np.repeat(np.arange(len(ordered)), q_lens)
    starts = np.array([item.start for item in ordered], np.int64)
    positions = starts[owners] + np.arange(len(owners)) - q_starts[owners]
    slots = tables[owners, positions // tokens_per_block] * tokens_per_block + positions % tokens_per_block
    parts = [token_ids, positions, slots, q_starts, np.array(seq_lens, np.int64), tables.ravel()]
    ends = np.cumsum([len(part) for part in parts]).tolist()
    tokens, at, to, bounds, lens, flat = torch.tensor_split(upload(np.concatenate(parts), device), ends[:-1])
    batch = PagedBatch(q_lens, seq_lens, bounds, lens, flat.view(tables.shape))
    return StepInput(tokens, at, to, batch, order, q_starts[1:].tolist())


def upload(values: Array, device: torch.device) -> Tensor:
    """`values` on `device`, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _block_tables(items: Sequence[BatchItem], seq_lens: Sequence[int], tokens_per_block: int) -> Array:
    """[num_items, most blocks of any item]; entries past an item's end are 0."""
    counts = [-(-seq_len // tokens_per_block) for seq_len in seq_lens]
    tables = np.zeros((len(items), max(counts)), np.int64)
    for row, (item, count) in enumerate(zip(items, counts, strict=True)):
        tables[row, :count] = item.block_ids[:count]
    return tables

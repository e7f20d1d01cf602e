"""A step as tensors. `StepExecutor` makes a `StepInput` from a packed `Step`; the decoder computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The rows of a step whose output is wanted, where it is not wanted of all rows.

    Attributes:
        rows: [num_rows] their numbers in the step.
        batches: one a cache group: each row as a sequence that computes this one token. All tokens before it are cached
            when the last layer attends.
    """

    rows: Tensor
    batches: Sequence[PagedBatch]


@dataclass(frozen=True, slots=True)
class GroupInput:
    """A step in one cache group.

    Attributes:
        pool: [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], of this rank's layers of the group.
        slots: [num_tokens] where each token is written. Slot s is token s % tokens_per_block of block
            s // tokens_per_block; -1: nowhere.
        batch: the step's sequences with their block tables in this group.
    """

    pool: Tensor
    slots: Tensor
    batch: PagedBatch


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, sequence after sequence.

    Attributes:
        token_ids, positions: [num_tokens]; a token's position counts from the start of its sequence.
        groups: one a cache group.
        outputs: the rows whose output is wanted; None: all rows.
    """

    token_ids: Tensor
    positions: Tensor
    groups: Sequence[GroupInput]
    outputs: OutputRows | None = None


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """`values` on `device`, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

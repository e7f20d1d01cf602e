"""A step's tensors: what a packed step looks like to the model."""

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
    """The only rows of a step whose output is wanted: each the last of its sequence's.

    `batches` are, a cache group each, these sequences as if this token were all that the step computes of them:
    everything before it is cached by then.
    """

    rows: Tensor
    batches: Sequence[PagedBatch]


@dataclass(frozen=True, slots=True)
class GroupInput:
    """A step in one cache group: token i writes to `slots[i]` of `pool`, and attends over the tables of `batch`.

    `pool` is [num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim], of the group's layers; slot s is
    token s % tokens_per_block of block s // tokens_per_block.
    """

    pool: Tensor
    slots: Tensor
    batch: PagedBatch


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, packed without padding: token i of the step is at `positions[i]`.

    `outputs` is None where every row's output is wanted.
    """

    token_ids: Tensor
    positions: Tensor
    groups: Sequence[GroupInput]
    outputs: OutputRows | None = None


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """`values` on `device`, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

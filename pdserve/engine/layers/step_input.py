"""A step's tensors: what a packed step looks like to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_kernels.paged_attention import PagedBatch


@dataclass(frozen=True, slots=True)
class OutputRows:
    """The only rows of a step whose output is wanted: each the last of its sequence's.

    `batch` are these sequences as if this token were all that the step computes of them: everything before it is cached
    by then.
    """

    rows: Tensor
    batch: PagedBatch


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, packed without padding: token i of the step is at `positions[i]` and writes its KV to `slots[i]`.

    `outputs` is None where every row's output is wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    batch: PagedBatch
    outputs: OutputRows | None = None


def upload(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """`values` on `device`, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

"""Kernels run compiled on a GPU where there is one, and in Triton's interpreter on the CPU otherwise."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")

"""Kernels run compiled on a GPU where there is one, and in Triton's interpreter on the CPU otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where kernels are compiled, tests of them belong to the GPU suite."""
    if INTERPRETED:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")

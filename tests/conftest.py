"""Fixtures for all tests, and threads that share two cores with a cluster's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported: idle OpenMP threads that spin starve every other process of the test run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pdserve.devices import visible_gpus
from tests.etcd_server import etcd_server, own_etcd_server

# Without a GPU, Triton kernels are tested in Triton's interpreter. Triton reads this when it is first imported, which
# any test module may cause; so it is set before the first of them is collected.
if not visible_gpus():
    os.environ["TRITON_INTERPRET"] = "1"

__all__ = ["etcd_server", "own_etcd_server"]

_TESTS = Path(__file__).parent
_ONE_AFTER_THE_OTHER = ("e2e",)
"""Folders whose tests share a cluster: one process runs them in turn, while others run the rest."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Says for `pytest -n`, with `--dist loadgroup`, which tests must stay together: those that share what is dear to
    set up, that is a folder's or a module's."""
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        if folder in _ONE_AFTER_THE_OTHER:
            item.add_marker(pytest.mark.xdist_group(folder))

"""Fixtures for all tests, and threads that share two cores with a cluster's."""

from __future__ import annotations

import os
from typing import Any

import hypothesis
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


# How long a case takes depends on what else the machine does.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n`: a process runs a file's tests in turn, and one runs all of e2e, which share clusters.

    (The group marks of pytest-xdist 3.8 do nothing with pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "e2e" if file.startswith("tests/e2e/") else file

    return Scheduling(config, log)

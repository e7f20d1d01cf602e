"""Fixtures for all tests, and threads that share two cores with a cluster's."""

from __future__ import annotations

import os

# Before torch is imported: idle OpenMP threads that spin starve every other process of the test run.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pdserve.devices import visible_gpus
from tests.etcd_server import etcd_server, own_etcd_server

# Without a GPU, Triton kernels are tested in Triton's interpreter. Triton reads this when it is first imported, which
# any test module may cause; so it is set before the first of them is collected.
if not visible_gpus():
    os.environ["TRITON_INTERPRET"] = "1"

__all__ = ["etcd_server", "own_etcd_server"]

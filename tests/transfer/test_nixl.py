"""NIXL: the suites of this folder over it, in processes of their own, and what can be asked of it without nixl."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kv_transfer.networks.greeting import Seal
from kv_transfer.networks.nixl import NixlLink, NixlNetwork
from kv_transfer.networks.nixl_agent import WHEELS
from pdserve.errors import ConfigError

SUITES = ("test_transport", "test_handoff", "test_endings", "test_faults", "test_processes", "nixl_suite")
SUITE_S = 150

needs_nixl = pytest.mark.skipif(
    not any(importlib.util.find_spec(wheel) for wheel in WHEELS), reason="nixl is not installed (pdserve[nixl])"
)


@needs_nixl
@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_passes_over_nixl(suite: str) -> None:
    file = Path(__file__).with_name(f"{suite}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"PDSERVE_TEST_BACKEND": "NIXL"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SUITE_S, check=False)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    for wheel in WHEELS:
        monkeypatch.setitem(sys.modules, wheel, None)
    monkeypatch.delitem(sys.modules, "ucxx", raising=False)


def refusal(device: str = "cpu") -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        NixlNetwork(torch.device(device))
    return caught.value


@pytest.mark.usefixtures("no_nixl")
def test_a_missing_nixl_is_fatal_and_names_the_extra() -> None:
    error = refusal()
    assert "pdserve[nixl]" in error.message
    assert error.param == "cache_transceiver_config.backend"


@pytest.mark.usefixtures("no_nixl")
def test_a_gpu_is_refused() -> None:
    assert "host memory only" in refusal("cuda").message


@pytest.mark.usefixtures("no_nixl")
def test_a_second_ucx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx", sys)
    assert "ucxx" in refusal().message


@pytest.mark.usefixtures("no_nixl")
@pytest.mark.parametrize(
    ("tls", "param"),
    [
        ("all", "UCX_TLS"),
        ("tcp,cma", "UCX_TLS"),
        ("rc, shm", "UCX_TLS"),
        ("^tcp", "UCX_TLS"),
        ("tcp", "cache_transceiver_config.backend"),
        ("^cma", "cache_transceiver_config.backend"),
        ("^tcp,sm", "cache_transceiver_config.backend"),
    ],
)
def test_transports_that_write_past_the_end_are_refused(monkeypatch: pytest.MonkeyPatch, tls: str, param: str) -> None:
    monkeypatch.setenv("UCX_TLS", tls)
    assert refusal().param == param


class StuckAgent:
    """An agent that NIXL does not let go of."""

    def expose(self, buffer: torch.Tensor) -> bytes | None:
        return b"metadata"

    def close(self) -> bool:
        return False


async def test_a_slot_that_may_still_be_written_to_is_not_given_back() -> None:
    link = NixlLink(lambda is_local: StuckAgent(), Seal("NIXL"), lambda link: None)  # type: ignore[arg-type, return-value]
    link.greet()
    received = link.recv_payload(1, torch.zeros(8, dtype=torch.uint8))
    link.close()
    await asyncio.sleep(0.01)
    assert not received.done()


def test_nixl_is_not_needed_to_import_the_transceiver() -> None:
    code = f"import sys, kv_transfer.transceiver; sys.exit(any(wheel in sys.modules for wheel in {WHEELS}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

"""What UCX keeps, and where it listens: bounded, whatever its peers do."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kv_transfer.networks import ucx_progress
from kv_transfer.networks.descriptors import Descriptors
from kv_transfer.networks.ucx import MAX_KEPT_LINKS, UcxNetwork
from kv_transfer.networks.ucx_api import UCXX_VERSION, check_version
from kv_transfer.networks.ucx_progress import Progress
from kv_transfer.networks.ucx_workers import MAX_MAPPED_PROCESSES, Workers
from pdserve.errors import ConfigError, TransferError
from tests.listeners import listening_addresses, outer
from tests.transfer.networks import ALONE
from tests.transfer.test_networks import INSTANCE, End, payload, until, within

pytestmark = pytest.mark.skipif(ALONE not in (None, "UCX"), reason="asks for UCX")


class UcxError(Exception):
    pass


class SlowRequest:
    """One that UCX does not let go of until it is told to."""

    completed = False

    def check_error(self) -> None:
        raise UcxError("cancelled")


class QuietWorker:
    def __init__(self) -> None:
        self.descriptor, self._other = os.pipe()
        self.num_progress = 0

    def progress(self) -> None:
        self.num_progress += 1

    def arm(self) -> bool:
        return True


async def test_a_buffer_that_ucx_gives_back_late_is_free_then_and_not_before() -> None:
    worker: Any = QuietWorker()
    request, kept = SlowRequest(), list[int]()
    progress = Progress(worker, UcxError, spin=False)
    future = progress.track(request, 8, object())
    progress.stop(kept.append)
    await asyncio.sleep(0.12)
    assert not future.done(), "UCX may still write to the buffer"
    assert progress._worker is worker
    request.completed = True
    with pytest.raises(TransferError):
        await within(future)
    await until(lambda: progress._worker is None)
    assert kept == []
    made_by_then = worker.num_progress
    await asyncio.sleep(0.12)
    assert worker.num_progress == made_by_then


async def test_buffers_that_ucx_never_gives_back_are_counted_and_end_the_transceiver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ucx_progress, "LINGER_S", 0.01)
    monkeypatch.setattr(ucx_progress, "_kept", [])
    transport, failures = UcxNetwork(torch.device("cpu")), list[TransferError]()
    transport.open("127.0.0.1", failures.append)
    futures = []
    for number in range(MAX_KEPT_LINKS + 1):
        assert failures == []
        quiet: Any = QuietWorker()
        progress = Progress(quiet, UcxError, spin=False)
        futures.append(progress.track(SlowRequest(), 8, object()))
        progress.stop(transport._on_kept)
        await until(lambda number=number: len(ucx_progress._kept) == number + 1)  # type: ignore[misc]
    assert len(failures) == 1
    assert not any(future.done() for future in futures)


class RecordingApi:
    """Takes note of each context's options."""

    error = UcxError

    def __init__(self) -> None:
        self.contexts: list[dict[str, str]] = []

    def context(self, options: dict[str, str]) -> dict[str, str]:
        self.contexts.append(options)
        return options

    def worker(self, context: dict[str, str]) -> Any:
        return SimpleNamespace(options=context)


@pytest.mark.parametrize("installed", ["0.51.0", "0.53.1", "1.52.0", "0.5", "unknown"])
def test_another_version_of_ucxx_is_refused_by_both_names(installed: str) -> None:
    check_version("0.52.00")
    with pytest.raises(ConfigError) as caught:
        check_version(installed)
    assert UCXX_VERSION in caught.value.message
    assert installed in caught.value.message


def workers(device: str) -> tuple[Any, RecordingApi]:
    api: Any = RecordingApi()
    return Workers(api, torch.device(device), Descriptors()), api


def test_ucx_may_keep_the_memory_of_so_many_processes_mapped_and_no_more() -> None:
    made, api = workers("cuda")
    for number in range(MAX_MAPPED_PROCESSES + 5):
        options = made.make(False, bytes((number,))).options
        assert (options.get("CUDA_IPC_CACHE") == "n") == (number >= MAX_MAPPED_PROCESSES)
    assert "CUDA_IPC_CACHE" not in made.make(False, bytes((0,))).options, "its memory is mapped already"
    assert "CUDA_IPC_CACHE" not in made.make(False, None).options, "nothing of the peer's is mapped"
    assert len(api.contexts) == 2


def test_contexts_are_made_when_they_are_needed_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, api = workers("cpu")
    assert api.contexts == []
    for _ in range(3):
        assert made.make(True, b"p").options["NET_DEVICES"] == "lo"
        assert "NET_DEVICES" not in made.make(False, b"p").options
    assert len(api.contexts) == 2
    monkeypatch.setenv("UCX_NET_DEVICES", "eth7")
    assert "NET_DEVICES" not in workers("cpu")[0].make(True, b"p").options, "the user's choice stands"


@pytest.mark.parametrize("sought", [INSTANCE, "nobody"], ids=["by name", "by address"])
@pytest.mark.parametrize(("near_host", "far_host"), [("localhost", "127.0.0.1"), ("192.0.2.77", "localhost")])
async def test_what_listens_at_loopback_listens_nowhere_else(sought: str, near_host: str, far_host: str) -> None:
    near, far = (UcxNetwork(torch.device("cpu")) for _ in range(2))
    near.open(near_host, pytest.fail)
    far.open(far_host, pytest.fail)
    before = listening_addresses(os.getpid())
    accepted: list[End] = []
    port = await far.listen(far_host, 0, INSTANCE, lambda link: accepted.append(End(link)))
    made = listening_addresses(os.getpid()) - before
    assert made
    assert not outer(made)
    near_end = End(await within(near.connect("127.0.0.1", port, sought)))  # type: ignore[arg-type]
    await until(lambda: bool(accepted))
    received = accepted[0].link.recv_payload(1, target := torch.zeros(1 << 20, dtype=torch.uint8))
    await within(asyncio.gather(near_end.link.send_payload(1, payload(1 << 20)), received))
    assert torch.equal(target, payload(1 << 20))
    made = listening_addresses(os.getpid()) - before
    assert len(made) > 1, "UCX listens as well"
    if near_host == "localhost":
        assert not outer(made)
    await near.close()
    await far.close()

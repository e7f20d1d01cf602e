"""Whoever connects to a transceiver and is none: costs it a connection and a line in the log, and nothing else."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from kv_transfer.networks import descriptors, stream_network, ucx_workers
from kv_transfer.networks.greeting import MAX_GREETING_BYTES, Seal
from kv_transfer.networks.stream_network import StreamNetwork
from pdserve.errors import TransferError
from tests.transfer.networks import ALONE, NETWORK, new_network
from tests.transfer.test_networks import End, until, within

only_ucx = pytest.mark.skipif(ALONE not in (None, "UCX"), reason="asks for UCX")
INSTANCE = f"strangers-{os.getpid()}"


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[StreamNetwork, int, list[End]]]:
    network = new_network(NETWORK)
    assert isinstance(network, StreamNetwork)
    ends: list[End] = []
    port = await network.listen("127.0.0.1", 0, INSTANCE, lambda link: ends.append(End(link)))
    try:
        yield network, port, ends
    finally:
        await network.close()


async def join(port: int) -> None:
    """A peer of ours still gets its link."""
    peer = new_network(NETWORK)
    try:
        await within(peer.connect("127.0.0.1", port, "nobody"))
    finally:
        await peer.close()


def strange_greetings() -> list[bytes]:
    dice = random.Random(0)
    sealed = Seal(NETWORK).close(bytes(16) + dice.randbytes(200))
    return [
        b"\0\0\0\016pdserve-kv/1 x",
        framed(b"pdserve-kv/1 " + dice.randbytes(217)),
        framed(b""),
        framed(sealed[:-1]),
        framed(sealed[:60] + dice.randbytes(len(sealed) - 60)),
        framed(Seal("SMOKE").close(b"signals")),
        framed(Seal(NETWORK, b"another cluster").close(bytes(200))),
        (MAX_GREETING_BYTES + 1).to_bytes(4, "big"),
        *(framed(dice.randbytes(dice.randrange(1, 400))) for _ in range(20)),
    ]


async def _meet_strangers() -> None:
    """Run in a process of its own, which ends if a stranger's bytes reach UCX."""
    async with listening() as (_, port, ends):
        for greeting in strange_greetings():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(greeting)
            assert await within(reader.read()) == b"", "nothing is told to strangers"
            writer.close()
        assert ends == []
        await join(port)


def test_no_greeting_ends_the_process() -> None:
    code = "import asyncio; from tests.transfer.test_strangers import _meet_strangers; asyncio.run(_meet_strangers())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.count("refused a connection from 127.0.0.1") == len(strange_greetings()), run.stderr


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Cycles stay: what must go has to go by itself."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@only_ucx
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("says", [b"", b"\0\0\0\016pdserve-kv/1 x"], ids=["silent", "garbage"])
async def test_probes_leave_nothing_behind(says: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(ucx_workers.Workers, "make", lambda *args: made.append(args))
    async with listening() as (network, port, ends):
        before = num_descriptors()
        for _ in range(100):
            probe = socket.create_connection(("127.0.0.1", port))
            probe.sendall(says)
            await asyncio.sleep(0)
            probe.close()
        await until(lambda: not network._greetings and not network._links)
        await until(lambda: num_descriptors() <= before)
    assert made == []
    assert ends == []


@only_ucx
@pytest.mark.usefixtures("no_collector")
async def test_a_link_that_closes_frees_its_descriptors() -> None:
    async with listening() as (network, port, ends):
        peer = new_network(NETWORK)
        await join(port)
        await until(lambda: bool(ends and ends[0].losses))
        ends.pop().link.close()
        await asyncio.sleep(0.01)
        before = num_descriptors()
        for _ in range(5):
            link = await within(peer.connect("127.0.0.1", port, INSTANCE))
            link.close()  # type: ignore[attr-defined]
            del link
            await until(lambda: bool(ends and ends[0].losses))
            ends.pop().link.close()
        await until(lambda: not network._links and num_descriptors() <= before)
        await peer.close()


async def test_the_silent_make_room_for_those_who_greet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream_network, "MAX_GREETINGS", 4)
    async with listening() as (network, port, _):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
        for reader, _ in silent[:8]:
            assert await within(reader.read()) == b""
        await until(lambda: len(network._links) == 4)
        await join(port)
        for _, writer in silent:
            writer.close()
    refused = [record for record in caplog.records if "refused a connection" in record.message]
    assert len(refused) >= 8
    assert all(record.exc_info is None for record in refused)


async def test_who_says_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_network, "GREETING_TIMEOUT_S", 0.05)
    async with listening() as (_, port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await within(reader.read()) == b""
        writer.close()


async def test_no_more_links_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_network, "MAX_LINKS", 2)
    async with listening() as (_, port, ends):
        peer = new_network(NETWORK)
        links = [await within(peer.connect("127.0.0.1", port, "nobody")) for _ in range(2)]
        await until(lambda: len(ends) == 2)
        with pytest.raises(TransferError) as caught:
            await within(peer.connect("127.0.0.1", port, "nobody"))
        assert caught.value.reason == "peer_lost"
        links.pop().close()  # type: ignore[attr-defined]
        await until(lambda: any(end.losses for end in ends))
        next(end for end in ends if end.losses).link.close()
        await within(peer.connect("127.0.0.1", port, "nobody"))
        await peer.close()


async def _run_out_of_descriptors() -> None:
    """Run in a process of its own, which opens all that it may."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    async with listening() as (network, port, ends):
        callers = [socket.socket() for _ in range(3)]
        opened = []
        try:
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            pass
        for caller in callers:
            caller.connect(("127.0.0.1", port))
        await until(lambda: bool(network.hindrance))
        await asyncio.sleep(3 * descriptors.PROBE_INTERVAL_S)
        assert network.hindrance, "nothing has changed"
        for each in opened:
            os.close(each)
        await until(lambda: not network.hindrance)
        await until(lambda: len(network._greetings) == len(callers))
        await join(port)
        await until(lambda: bool(ends))


def test_a_want_of_descriptors_is_told_and_outlived() -> None:
    code = "import asyncio; from tests.transfer import test_strangers as t; asyncio.run(t._run_out_of_descriptors())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("no further connection can be made: Too many open files") == 1, run.stderr
    assert "Traceback" not in run.stderr


@only_ucx
async def test_no_worker_is_made_with_too_few_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with listening() as (network, port, ends):
        missing: list[OSError | None] = [OSError(24, "Too many open files")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(descriptors, "_missing", lambda: missing[0])
            peer = new_network(NETWORK)
            with pytest.raises(TransferError, match="Too many open files"):
                await within(peer.connect("127.0.0.1", port, "nobody"))
            assert "Too many open files" in peer.hindrance
            missing[0] = None
            await until(lambda: not peer.hindrance)
        await within(peer.connect("127.0.0.1", port, "nobody"))
        await until(lambda: bool(ends))
        await peer.close()
        assert not network.hindrance

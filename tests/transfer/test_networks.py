"""What `backends.base` promises, against every backend alike."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import torch
import uvloop

from kv_transfer.networks.base import Link, Network
from kv_transfer.networks.control import ControlStream
from kv_transfer.networks.stream_network import _connect_locally, _local_name
from kv_transfer.networks.ucx import UcxNetwork
from pdserve.errors import ConfigError, TransferError
from tests.transfer.networks import ALONE, BACKENDS, NETWORK, new_network

DEADLINE_S = 10.0
INSTANCE = f"test-{os.getpid()}"

only_ucx = pytest.mark.skipif(ALONE not in (None, "UCX"), reason="asks for UCX")


@dataclass
class End:
    """One end of a link, and what came in there."""

    link: Link
    frames: list[bytes] = field(default_factory=list)
    losses: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.link.attach(self.frames.append, self.losses.append)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (a fake network has nothing to wait on)
            await asyncio.sleep(0.001)


async def within(wait: Awaitable[object]) -> object:
    return await asyncio.wait_for(wait, DEADLINE_S)


def payload(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Backend:
    """A network, and the name that listeners are looked for by: theirs, or nobody's."""

    name: str
    sought: str = INSTANCE

    def __call__(self) -> Network:
        return new_network(self.name)


@pytest.fixture(params=[*map(Backend, BACKENDS), Backend(NETWORK, "nobody")], ids=[*BACKENDS, f"{NETWORK}-by-address"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param  # type: ignore[no-any-return]


@asynccontextmanager
async def joined(backend: Backend) -> AsyncIterator[tuple[End, End]]:
    """Two ends of one link: the one that connected, and the one that listened."""
    near, far = backend(), backend()
    accepted: list[End] = []
    port = await far.listen("127.0.0.1", 0, INSTANCE, lambda link: accepted.append(End(link)))
    try:
        near_end = End(await near.connect("127.0.0.1", port, backend.sought))
        await until(lambda: bool(accepted))
        yield near_end, accepted[0]
    finally:
        await near.close()
        await far.close()


async def test_frames_come_whole_and_in_order(backend: Backend) -> None:
    async with joined(backend) as (near, far):
        frames = [bytes([i % 256]) * (i * 37 % 5000) for i in range(300)] + [b"x" * 300_000]
        for frame in frames:
            near.link.send_control(frame)
            far.link.send_control(frame)
        await until(lambda: len(near.frames) == len(far.frames) == len(frames))
        assert near.frames == frames
        assert far.frames == frames


@pytest.mark.parametrize("size", [1, 7, 8191, 8192, 70_001, 5 << 20])
async def test_payload_is_bit_exact(backend: Backend, size: int) -> None:
    async with joined(backend) as (near, far):
        sent, target = payload(size), torch.zeros(size + 64, dtype=torch.uint8)
        received = far.link.recv_payload(11, target[:size])
        await within(asyncio.gather(near.link.send_payload(11, sent), received))
        assert received.result() == size
        assert torch.equal(target[:size], sent)
        assert not target[size:].any()
        assert near.link.transport


async def test_payload_is_matched_by_tag_in_any_order(backend: Backend) -> None:
    async with joined(backend) as (near, far):
        sent = {tag: payload(20_000, tag) for tag in range(1, 9)}
        targets = {tag: torch.zeros(20_000, dtype=torch.uint8) for tag in sent}
        waits = [far.link.recv_payload(tag, targets[tag]) for tag in sorted(sent)]
        waits += [near.link.send_payload(tag, sent[tag]) for tag in sorted(sent, reverse=True)]
        await within(asyncio.gather(*waits))
        for tag in sent:
            assert torch.equal(targets[tag], sent[tag])


async def test_one_byte_redeems_a_large_receive(backend: Backend) -> None:
    async with joined(backend) as (near, far):
        target = torch.zeros(1 << 20, dtype=torch.uint8)
        received = far.link.recv_payload(5, target)
        await within(asyncio.gather(near.link.send_payload(5, payload(1)), received))
        assert not target[1:].any()


async def test_closing_ends_what_is_open_and_tells_the_peer(backend: Backend) -> None:
    async with joined(backend) as (near, far):
        open_receives = [far.link.recv_payload(tag, torch.zeros(1 << 20, dtype=torch.uint8)) for tag in (1, 2)]
        open_send = far.link.send_payload(9, payload(1 << 20))
        far.link.close()
        far.link.close()
        for wait in (*open_receives, open_send):
            with pytest.raises(TransferError) as caught:
                await within(wait)
            assert caught.value.reason == "peer_lost"
        await until(lambda: bool(near.losses))
        assert len(near.losses) == 1
        assert far.losses == []


async def test_what_comes_after_closing_is_not_written(backend: Backend) -> None:
    async with joined(backend) as (near, far):
        target = torch.zeros(1 << 20, dtype=torch.uint8)
        received = far.link.recv_payload(1, target)
        far.link.close()
        late = near.link.send_payload(1, payload(1 << 20))
        await asyncio.sleep(0.05)
        near.link.close()
        await within(asyncio.gather(received, late, return_exceptions=True))
        assert not target.any()


async def test_a_closed_link_refuses_payload_and_swallows_frames(backend: Backend) -> None:
    async with joined(backend) as (near, _):
        near.link.close()
        near.link.send_control(b"late")
        for wait in (near.link.send_payload(1, payload(8)), near.link.recv_payload(2, payload(8))):
            with pytest.raises(TransferError) as caught:
                await within(wait)
            assert caught.value.reason == "peer_lost"


async def test_links_do_not_share_tags(backend: Backend) -> None:
    near, far = backend(), backend()
    accepted: list[End] = []
    port = await far.listen("127.0.0.1", 0, INSTANCE, lambda link: accepted.append(End(link)))
    try:
        ends = [End(await near.connect("127.0.0.1", port, backend.sought)) for _ in range(2)]
        await until(lambda: len(accepted) == 2)
        ends[0].link.send_control(b"first")
        ends[1].link.send_control(b"second")
        await until(lambda: all(end.frames for end in accepted))
        accepted.sort(key=lambda end: end.frames[0])
        targets = [torch.zeros(50_000, dtype=torch.uint8) for _ in range(2)]
        waits = [accepted[i].link.recv_payload(1, targets[i]) for i in (0, 1)]
        waits += [ends[i].link.send_payload(1, payload(50_000, i)) for i in (1, 0)]  # type: ignore[misc]
        await within(asyncio.gather(*waits))
        for i in (0, 1):
            assert torch.equal(targets[i], payload(50_000, i))
    finally:
        await near.close()
        await far.close()


async def test_nobody_there_is_peer_lost(backend: Backend) -> None:
    transport = backend()
    port = await transport.listen("127.0.0.1", 0, INSTANCE, lambda link: None)
    await transport.close()
    with pytest.raises(TransferError) as caught:
        await within(backend().connect("127.0.0.1", port, backend.sought))
    assert caught.value.reason == "peer_lost"


@pytest.mark.parametrize(
    ("sought", "family"), [(INSTANCE, socket.AF_UNIX), ("nobody", socket.AF_INET)], ids=["known", "unknown"]
)
async def test_within_a_host_no_network_is_asked(sought: str, family: int, monkeypatch: pytest.MonkeyPatch) -> None:
    families: list[int] = []
    made = ControlStream.connection_made

    def connection_made(self: ControlStream, transport: asyncio.Transport) -> None:
        families.append(transport.get_extra_info("socket").family)
        made(self, transport)

    monkeypatch.setattr(ControlStream, "connection_made", connection_made)
    async with joined(Backend(NETWORK, sought)) as (near, far):
        near.link.send_control(b"hello")
        await until(lambda: far.frames == [b"hello"])
    assert families == [family, family]


async def test_two_with_one_name_are_reached_each_by_its_address() -> None:
    first, second, near = new_network(NETWORK), new_network(NETWORK), new_network(NETWORK)
    links: list[Link] = []
    await first.listen("127.0.0.1", 0, INSTANCE, lambda _: None)
    port = await second.listen("127.0.0.1", 0, INSTANCE, links.append)
    await first.close()
    try:
        near_end = End(await near.connect("127.0.0.1", port, INSTANCE))
        await until(lambda: bool(links))
        near_end.link.send_control(b"hello")
        far_end = End(links[0])
        await until(lambda: bool(far_end.frames))
        assert far_end.frames == [b"hello"]
    finally:
        await near.close()
        await second.close()


def test_a_connection_that_ends_as_it_is_made_closes_no_descriptor_of_others() -> None:
    async def connect_and_close() -> None:
        server = await asyncio.get_running_loop().create_unix_server(asyncio.Protocol, _local_name(INSTANCE))
        streams = [ControlStream(lambda _: None, lambda _: None) for _ in range(20)]
        for stream in streams:
            stream.close()
            assert await _connect_locally(stream, INSTANCE)
        await asyncio.sleep(0.01)  # the loop closes what it has
        of_others = [os.open(os.devnull, os.O_RDONLY) for _ in streams]
        streams.clear()
        del stream
        gc.collect()
        for descriptor in of_others:
            os.close(descriptor)  # raises if it is closed already
        server.close()

    uvloop.run(connect_and_close())


async def test_a_taken_port_is_an_error(backend: Backend) -> None:
    first, second = backend(), backend()
    port = await first.listen("127.0.0.1", 0, INSTANCE, lambda link: None)
    try:
        with pytest.raises(OSError):
            await second.listen("127.0.0.1", port, "another", lambda link: None)
    finally:
        await first.close()
        await second.close()


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


HERE = ["127.0.0.1", "localhost"] + (["::1", "[::1]"] if has_ipv6() else [])
EVERYWHERE = ["", "0.0.0.0"] + (["::", "[::]"] if has_ipv6() else [])


@pytest.mark.parametrize(
    ("at", "dialled"),
    [*((each, each) for each in HERE), *((each, "127.0.0.1") for each in EVERYWHERE), ("localhost", "127.0.0.1")]
    + [(each, "::1") for each in ("", "::", "localhost") if has_ipv6()],
)
async def test_a_host_is_dialled_as_it_is_written(at: str, dialled: str) -> None:
    if (at, dialled) == ("localhost", "::1") and not any(
        found[0] == socket.AF_INET6 for found in socket.getaddrinfo("localhost", None)
    ):
        pytest.skip("localhost has no IPv6 address here")
    near, far, links = new_network(NETWORK), new_network(NETWORK), list[Link]()
    far.open(at, pytest.fail)
    port = await far.listen(at, 0, INSTANCE, links.append)
    try:
        await within(near.connect(dialled, port, "nobody"))
        await until(lambda: bool(links))
    finally:
        await near.close()
        await far.close()


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x05hello", b"\xff" * 64])
async def test_a_stranger_is_hung_up_on(noise: bytes) -> None:
    transport = new_network(NETWORK)
    links: list[Link] = []
    port = await transport.listen("127.0.0.1", 0, INSTANCE, links.append)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(noise)
        await within(reader.read())
        writer.close()
        assert links == []
    finally:
        await transport.close()


@only_ucx
def test_an_unknown_progress_mode_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXPY_PROGRESS_MODE", "thread")
    with pytest.raises(ConfigError, match="polling, blocking") as caught:
        UcxNetwork(torch.device("cpu"))
    assert caught.value.param == "UCXPY_PROGRESS_MODE"


@only_ucx
async def test_polling_mode_moves_payload_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCXPY_PROGRESS_MODE", "polling")
    async with joined(Backend("UCX")) as (near, far):
        target = torch.zeros(1 << 20, dtype=torch.uint8)
        received = far.link.recv_payload(3, target)
        await asyncio.sleep(0.02)
        await within(asyncio.gather(near.link.send_payload(3, payload(1 << 20)), received))
        assert torch.equal(target, payload(1 << 20))


@only_ucx
def test_a_missing_ucxx_is_fatal_and_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ucxx._lib", None)
    with pytest.raises(ConfigError, match=r"pdserve\[ucx\]") as caught:
        UcxNetwork(torch.device("cpu"))
    assert caught.value.param == "cache_transceiver_config.backend"


def test_ucxx_is_not_needed_to_import_the_transceiver() -> None:
    code = "import sys, kv_transfer.transceiver; sys.exit('ucxx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

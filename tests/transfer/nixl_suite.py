"""What only NIXL can get wrong. Run by `test_nixl`, in a process without ucxx."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection

import pytest
import torch

from kv_transfer.networks import nixl_agent
from kv_transfer.networks.greeting import Seal
from kv_transfer.networks.nixl import FIELDS, Kind
from pdserve.errors import TransferError
from tests.transfer.harness import POISON
from tests.transfer.networks import new_network
from tests.transfer.peer import _processes
from tests.transfer.test_networks import INSTANCE, Backend, End, joined, payload, until, within

LARGE_BYTES = 64 << 20
SEAL = Seal("NIXL")


def write_for_ever(port: int, pipe: Connection) -> None:
    """A sender that redeems tag after tag."""

    async def write() -> None:
        link = await new_network("NIXL").connect("127.0.0.1", port, INSTANCE)
        End(link)
        source = torch.full((LARGE_BYTES,), 7, dtype=torch.uint8)
        pipe.send(None)
        for tag in range(1, 1000):
            await link.send_payload(tag, source)

    asyncio.run(write())


async def test_a_writer_that_was_frozen_meanwhile_writes_to_no_slot_that_was_taken_back() -> None:
    receiver, links = new_network("NIXL"), []
    port = await receiver.listen("127.0.0.1", 0, INSTANCE, links.append)
    ours, theirs = _processes.Pipe()
    writer = _processes.Process(target=write_for_ever, args=(port, theirs), daemon=True)
    writer.start()
    try:
        await asyncio.to_thread(ours.recv)
        await until(lambda: bool(links))
        end = End(links[0])
        slots = [torch.zeros(LARGE_BYTES, dtype=torch.uint8) for _ in range(3)]
        received = [end.link.recv_payload(tag, slot) for tag, slot in enumerate(slots, start=1)]
        await within(received[0])
        await until(lambda: bool(slots[1][0] == 7))
        os.kill(writer.pid or 0, signal.SIGSTOP)
        assert not received[2].done()
        end.link.close()
        for wait in received[1:]:
            assert wait.done(), "nothing that the peer does is waited for"
            assert wait.exception() is None or isinstance(wait.exception(), TransferError)
        for slot in slots:
            slot.fill_(POISON)
        os.kill(writer.pid or 0, signal.SIGCONT)
        await asyncio.sleep(0.3)
        assert all(bool((slot == POISON).all()) for slot in slots)
    finally:
        writer.kill()
        await asyncio.to_thread(writer.join, 10)
        await receiver.close()


async def test_waiting_for_a_payload_costs_nothing() -> None:
    async with joined(Backend("NIXL")) as (near, far):
        target = torch.zeros(1 << 20, dtype=torch.uint8)
        await within(asyncio.gather(far.link.recv_payload(1, target), near.link.send_payload(1, payload(1 << 20))))
        waiting = far.link.recv_payload(2, target)
        await asyncio.sleep(0.05)
        began_s = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - began_s < 0.05
        assert not waiting.done()
        far.link.close()
        with pytest.raises(TransferError):
            await within(waiting)


async def test_closing_a_link_gives_its_agent_back() -> None:
    async with joined(Backend("NIXL")) as (near, far):
        open_files = len(os.listdir("/proc/self/fd"))
        for tag in range(20):
            far.link.recv_payload(tag, payload(100_000, tag)).add_done_callback(lambda future: future.exception())
            near.link.send_payload(tag, payload(100_000)).add_done_callback(lambda future: future.exception())
        await asyncio.sleep(0.002)
        near.link.close()
        far.link.close()
        await asyncio.sleep(0.01)
        assert len(os.listdir("/proc/self/fd")) < open_files


class StuckWrite:
    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def release(self) -> None:
        raise self._error("in progress")


@pytest.mark.parametrize("stuck", ["write", "agent"])
def test_an_agent_that_lives_on_says_so(stuck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_kept", kept := [])
    api = nixl_agent.NixlApi()
    agent, untouched = nixl_agent.Agent(api), nixl_agent.Agent(api)
    held = agent._agent.agent if stuck == "agent" else None
    if stuck == "write":
        agent._writes[1] = StuckWrite(api.errors[-1])
    assert not agent.close()
    assert kept == [agent]
    assert untouched.close()
    del held


@asynccontextmanager
async def heard(frame: bytes) -> AsyncIterator[End]:
    """The end of a link whose peer has joined and sent `frame`."""
    transport, links = new_network("NIXL"), []
    port = await transport.listen("127.0.0.1", 0, INSTANCE, links.append)
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for each in (SEAL.close(b""), frame):
            writer.write(len(each).to_bytes(4, "big") + each)
        await until(lambda: bool(links))
        yield End(links[0])
        links[0].close()
    finally:
        writer.close()
        await transport.close()


MEMORY = bytes((Kind.MEMORY,))


@pytest.mark.parametrize(
    "frame", [b"", b"\x09what", bytes((Kind.GRANT,)) + b"short", MEMORY + b"no", MEMORY + SEAL.close(b"no")]
)
async def test_a_malformed_frame_loses_the_link(frame: bytes) -> None:
    async with heard(frame) as end:
        await until(lambda: bool(end.losses))


async def test_a_grant_of_memory_that_was_not_exposed_loses_the_link() -> None:
    async with heard(bytes((Kind.GRANT,)) + FIELDS[Kind.GRANT].pack(1, 4096, 64)) as end:
        sent = end.link.send_payload(1, payload(64))
        await until(lambda: bool(end.losses))
        end.link.close()
        with pytest.raises(TransferError):
            await within(sent)

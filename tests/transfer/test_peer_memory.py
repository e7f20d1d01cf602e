"""Mapping a peer's pool: only where it may and can be reached, never beyond its memory, and not before it was seen to
be what it should."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from kv_transfer import cuda_ipc, peer_memory
from kv_transfer.cuda_ipc import HANDLE_BYTES
from kv_transfer.peer_memory import NONCE_BYTES, PeerPool, PoolName, map_pool, publish
from pd_kernels.kv_pack import MARGIN_BYTES
from pdserve.errors import TransferError
from pdserve.handoff import ExportDone, ImportDone
from pdserve.protocol import Key
from tests.transfer.harness import (
    DIRECT,
    MakeNode,
    accept_into,
    context,
    generation,
    nodes,
    pool_tensor,
    rows,
)
from tests.transfer.networks import SIMPLE

make_node = pytest.fixture(nodes, params=[SIMPLE + DIRECT])

GPU_BLOCK_BYTES = 1 << 20


class GpuPool:
    """What is asked of a pool on a GPU before it is shared: three blocks, with margins."""

    is_cuda = True
    device = torch.device("cuda")
    shape = (3,)

    def data_ptr(self) -> int:
        return MARGIN_BYTES


def published_by_a_gpu(monkeypatch: pytest.MonkeyPatch) -> PoolName | None:
    """The name of such a pool, in another process."""
    monkeypatch.setattr(cuda_ipc, "export", lambda address: (bytes(HANDLE_BYTES), MARGIN_BYTES))
    monkeypatch.setattr(peer_memory, "_write_nonce", lambda pool: bytes(NONCE_BYTES))
    pool: Any = GpuPool()
    name = publish(pool)
    return None if name is None else msgspec.structs.replace(name, process="another")


class Handle:
    """`CUipcMemHandle`: bytes at an address."""

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(HANDLE_BYTES)

    def getPtr(self) -> int:  # noqa: N802
        return ctypes.addressof(self.memory)


class Driver:
    """`cuda.bindings.driver`, where another process's allocation holds three blocks and two margins. An allocation of
    this process begins at `OWN`."""

    BASE, OWN = 1 << 40, 1 << 30
    CUipcMemHandle = Handle
    CUipcMem_flags = SimpleNamespace(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS=SimpleNamespace(value=1))

    def __init__(self, monkeypatch: pytest.MonkeyPatch, knows_sizes: bool = True) -> None:
        self.opened: list[bytes] = []
        self.closed: list[int] = []
        self._knows_sizes = knows_sizes
        monkeypatch.setattr(cuda_ipc, "_driver", lambda: self)

    def cuIpcOpenMemHandle(self, handle: Handle, flags: int) -> tuple[int, int]:  # noqa: N802
        assert flags == 1
        self.opened.append(handle.memory.raw)
        return 0, self.BASE

    def cuIpcGetMemHandle(self, address: int) -> tuple[int, Handle]:  # noqa: N802
        assert address == self.OWN
        handle = Handle()
        handle.memory.raw = bytes(range(HANDLE_BYTES))
        return 0, handle

    def cuMemGetAddressRange(self, address: int) -> tuple[int, int, int]:  # noqa: N802
        base = self.BASE if address >= self.BASE else self.OWN
        return 0 if self._knows_sizes else 1, base, 3 * GPU_BLOCK_BYTES + 2 * MARGIN_BYTES

    def cuIpcCloseMemHandle(self, address: int) -> tuple[int]:  # noqa: N802
        self.closed.append(address)
        return (0,)


def test_a_handle_is_of_the_allocation_that_an_address_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    assert cuda_ipc.export(Driver.OWN + MARGIN_BYTES) == (bytes(range(HANDLE_BYTES)), MARGIN_BYTES)
    Driver(monkeypatch, knows_sizes=False)
    assert cuda_ipc.export(Driver.OWN) is None


def test_without_cuda_bindings_nothing_is_shared_or_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_ipc, "_driver", lambda: None)
    assert cuda_ipc.export(Driver.OWN) is None
    assert cuda_ipc.open_mapping(bytes(HANDLE_BYTES)) is None


def test_cuda_bindings_have_what_is_used() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    for name in ("cuIpcOpenMemHandle", "cuIpcGetMemHandle", "cuIpcCloseMemHandle", "cuMemGetAddressRange"):
        assert callable(getattr(driver, name))
    assert driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value == 1
    handle, content = driver.CUipcMemHandle(), bytes(range(HANDLE_BYTES))
    ctypes.memmove(handle.getPtr(), content, HANDLE_BYTES)
    assert ctypes.string_at(handle.getPtr(), HANDLE_BYTES) == content


@pytest.mark.parametrize(
    ("tls", "shared"),
    [
        (None, True),
        ("all", True),
        ("tcp, cuda_ipc", True),
        ("rc,cuda", True),
        ("^tcp", True),
        ("tcp,cuda_copy", False),
        ("^cuda_ipc", False),
        ("^cuda,shm", False),
    ],
)
def test_no_gpu_is_read_past_what_ucx_may_use(monkeypatch: pytest.MonkeyPatch, tls: str | None, shared: bool) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    if tls is not None:
        monkeypatch.setenv("UCX_TLS", tls)
    assert (published_by_a_gpu(monkeypatch) is not None) == shared


def test_no_gpu_is_mapped_past_what_ucx_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, name = Driver(monkeypatch), published_by_a_gpu(monkeypatch)
    assert name is not None
    monkeypatch.setenv("UCX_TLS", "tcp,cuda_copy")
    assert map_pool(name, GPU_BLOCK_BYTES, torch.device("cuda")) is None
    assert not driver.opened
    monkeypatch.setenv("UCX_TLS", "tcp,cuda_copy,cuda_ipc")
    assert map_pool(name, GPU_BLOCK_BYTES, torch.device("cuda")) is not None
    assert driver.opened == [bytes(HANDLE_BYTES)]


CLAIMS = {
    "as it is": ({}, GPU_BLOCK_BYTES, True),
    "one block more": ({"num_blocks": 4}, GPU_BLOCK_BYTES, False),
    "larger blocks": ({}, GPU_BLOCK_BYTES + 1, False),
    "no block": ({"num_blocks": 0}, GPU_BLOCK_BYTES, False),
    "fewer than none": ({"num_blocks": -1}, GPU_BLOCK_BYTES, False),
    "more than there is memory": ({"num_blocks": 2**62}, GPU_BLOCK_BYTES, False),
    "further in": ({"offset": MARGIN_BYTES + 1}, GPU_BLOCK_BYTES, False),
    "before the allocation": ({"offset": -(1 << 20)}, GPU_BLOCK_BYTES, False),
    "in the first margin": ({"offset": MARGIN_BYTES - 1}, GPU_BLOCK_BYTES, False),
}


@pytest.mark.parametrize(("claim", "block_bytes", "true"), CLAIMS.values(), ids=list(CLAIMS))
def test_a_pool_is_held_against_the_allocation_that_it_is_in(
    monkeypatch: pytest.MonkeyPatch, claim: dict[str, int], block_bytes: int, true: bool
) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    driver, name = Driver(monkeypatch), published_by_a_gpu(monkeypatch)
    assert name is not None
    name = msgspec.structs.replace(name, **claim)
    if true:
        mapped = map_pool(name, block_bytes, torch.device("cuda"))
        assert mapped is not None
        assert mapped.address == Driver.BASE + name.offset
        mapped.close()
    else:
        with pytest.raises(TransferError) as caught:
            map_pool(name, block_bytes, torch.device("cuda"))
        assert caught.value.reason == "protocol"
    assert driver.closed == [Driver.BASE], "it is unmapped either way"


def test_a_mapping_whose_size_nobody_knows_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_TLS", raising=False)
    driver, name = Driver(monkeypatch, knows_sizes=False), published_by_a_gpu(monkeypatch)
    assert name is not None
    assert map_pool(name, GPU_BLOCK_BYTES, torch.device("cuda")) is None
    assert driver.closed == [Driver.BASE]


def test_a_pool_is_mapped_by_those_who_can_reach_it_only() -> None:
    pool = pool_tensor(4, seed=1)
    name = publish(pool)
    assert name is not None
    block_bytes = pool[0].nbytes
    mapped = map_pool(name, block_bytes, torch.device("cpu"))
    assert mapped is not None
    assert (mapped.address, mapped.num_blocks) == (pool.data_ptr(), 4)
    for other in (
        {"host": "another host"},
        {"process": "another process"},
        {"device": "cuda"},
        {"pool": "no pool"},
        {"nonce": b""},
    ):
        assert map_pool(msgspec.structs.replace(name, **other), block_bytes, torch.device("cpu")) is None
    for claim, size in (({"num_blocks": 5}, block_bytes), ({}, block_bytes + 1)):
        with pytest.raises(TransferError):
            map_pool(msgspec.structs.replace(name, **claim), size, torch.device("cpu"))
    mapped.close()
    del mapped, pool
    assert map_pool(name, block_bytes, torch.device("cpu")) is None


def test_a_pool_without_margins_is_not_shared() -> None:
    assert publish(torch.zeros(4, 8)) is None


@pytest.mark.parametrize("end", [0, 1], ids=["first", "last"])
def test_a_mapping_that_reads_something_else_is_given_up_for_staging_with_one_word(
    make_node: MakeNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: int
) -> None:
    """As of a host whose peer access succeeds and does not work."""
    mapped = PeerPool.__init__

    def elsewhere(self: PeerPool, *of: Any, **options: Any) -> None:
        mapped(self, *of, **options)
        (self.address, self.nbytes) = (self.address + 64, self.nbytes) if end == 0 else (self.address, self.nbytes - 64)

    monkeypatch.setattr(PeerPool, "__init__", elsewhere)
    gen = generation(make_node, on_offer=accept_into(lambda key: range(7)))
    ctx = context(make_node)
    for number in range(3):
        key = Key(f"r{number}", 0)
        ctx.exporter.offer(key, gen.address, 27, range(3, 10))
        ctx.exporter.finish(key, 1)
        gen.wait(ImportDone, key)
        ctx.wait(ExportDone, key)
        assert torch.equal(rows(gen.tensor, range(7)), rows(ctx.tensor, range(3, 10)))
        # The next is by another connection.
        link = next(iter(ctx.transceiver._halves.exports._peers.values()))[0]  # type: ignore[attr-defined]
        ctx.transceiver._loop.call_soon_threadsafe(link.close, TransferError("cut", "aborted"))
        ctx.wait_until(lambda: link.closed, "the connection's end")  # noqa: B023
    assert all(counts.transport == "memory" for counts in gen.transceiver.counts())
    warnings = [record for record in caplog.records if "wrong data" in record.message]
    assert len(warnings) == 1
    assert "context-0" in warnings[0].message

"""Handoffs between GPU pools of two processes: bit-exact, ordered after the kernels that made the KV, and how fast;
read out of the sender's pool, and staged.

Run with `-s` to see the rates. The shape is Llama-3.1-8B's: 32 layers, 8 KV heads of 128, bfloat16, 4 MiB a block.
"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest
import torch
import torch.multiprocessing as mp

from context_worker.exporter import Exporter
from context_worker.handoffs import Exports
from generation_worker.handoffs import Imports
from generation_worker.importer import Importer
from kv_transfer import peer_memory
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView
from kv_transfer.networks import ucx_workers
from kv_transfer.options import TransceiverOptions
from kv_transfer.transceiver import Transceiver
from pd_kernels.kv_pack import pool_with_margins
from pd_kernels.kv_pack.reference import convert
from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ImportDone, ImportOffered
from pdserve.protocol import Key, KvAddress

GROUP = GroupLayout(
    num_layers=32,
    kv_factor=2,
    num_kv_heads=8,
    tokens_per_block=32,
    head_dim=128,
    dtype="bfloat16",
)
LAYOUT = KvLayout(model="shape of 8B", groups=(GROUP,))
OTHER_GROUP = msgspec.structs.replace(GROUP, tokens_per_block=16, dtype="float8_e4m3fn")
OTHER_LAYOUT = KvLayout(model="shape of 8B", groups=(OTHER_GROUP,))
NUM_BLOCKS = 300
MIB = 1 << 20
POISON = 0x5A
WAIT_S = 60.0
BUSY_CYCLES = 6_000_000_000
"""Three seconds of a GPU, more or less."""

DEVICES = [
    pytest.param(("cuda:0", "cuda:0"), marks=pytest.mark.gpu, id="one-gpu"),
    pytest.param(("cuda:0", "cuda:1"), marks=pytest.mark.multigpu, id="two-gpus"),
]
WAYS = [
    pytest.param(CacheTransceiverConfig(direct_reads=reads), id="read" if reads else "staged")
    for reads in (True, False)
]
CHECKED = [CacheTransceiverConfig(checksum=True, direct_reads=reads) for reads in (True, False)]
DEFAULT = CacheTransceiverConfig()


def new_pool(device: str, seed: int | None, of: KvLayout = LAYOUT) -> torch.Tensor:
    (group,) = of.groups
    tensor = pool_with_margins((NUM_BLOCKS, *group.block_shape), getattr(torch, group.dtype), device)
    raw = as_bytes(tensor)
    if seed is None:
        raw.fill_(POISON)
    else:
        raw.random_(0, 256, generator=torch.Generator(device).manual_seed(seed))
    torch.cuda.synchronize(device)
    return tensor


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(NUM_BLOCKS, -1).view(torch.uint8)


def arrived(tensor: torch.Tensor, of: KvLayout, device: str, seed: int, source: list[int], target: list[int]) -> bool:
    """Whether the pool of the context worker's that `seed` makes is here, block by block of the sequence."""
    sent = new_pool(device, seed)
    if of == LAYOUT:
        return torch.equal(as_bytes(tensor)[target], as_bytes(sent)[source])
    tokens = convert(sent[source], tensor.dtype).float().permute(0, 4, 1, 2, 3, 5).flatten(0, 1)
    here = tensor[target].float().permute(0, 4, 1, 2, 3, 5).flatten(0, 1)
    return bool(((here == tokens) | (here.isnan() & tokens.isnan())).all())


def bytes_in(transceiver: Transceiver) -> int:
    return sum(count.bytes for count in transceiver.counts())


def generation(
    pipe: Connection,
    device: str,
    of: KvLayout = LAYOUT,
    config: CacheTransceiverConfig = DEFAULT,
    stall_timeout_s: float = 2.0,
) -> None:
    """The child: accepts handoff "first" into blocks from number first on, those of a "first-busy" behind three seconds
    of work on its stream; compares, or tells how many bytes have come, when asked."""
    torch.cuda.set_device(device)
    events: queue.Queue[Any] = queue.Queue()
    tensor = new_pool(device, None, of)
    transceiver = Transceiver(
        KvPoolView((tensor,), of),
        config,
        TransceiverOptions("generation-0", "127.0.0.1", stall_timeout_s=stall_timeout_s),
        events.put,
        imports=Imports(),
    )
    importer = Importer(transceiver)
    pipe.send(transceiver.start())
    while True:
        if pipe.poll():
            request = pipe.recv()
            if request is None:
                break
            if request == "bytes":
                pipe.send(bytes_in(transceiver))
                continue
            seed, source, target = request
            others = [block for block in range(NUM_BLOCKS) if block not in target]
            exact = arrived(tensor, of, device, seed, source, target)
            pipe.send((exact, bool((as_bytes(tensor)[others] == POISON).all()), transceiver.counts()))
        try:
            event = events.get(timeout=0.002)
        except queue.Empty:
            continue
        if isinstance(event, ImportOffered):
            first = int(event.key.request_id.partition("-")[0])
            blocks = range(first, first + -(-event.num_tokens // of.groups[0].tokens_per_block))
            if event.key.request_id.endswith("busy"):
                torch.cuda._sleep(BUSY_CYCLES)
            importer.accept(event.key, (blocks,), 0)
        else:
            assert isinstance(event, ImportDone), event
    transceiver.close()


def generation_without_mappings(pipe: Connection, *arguments: Any) -> None:
    """As `generation`, where UCX has kept the memory of as many processes mapped as it may."""
    ucx_workers.MAX_MAPPED_PROCESSES = 0
    generation(pipe, *arguments)


class Context:
    """The parent's transceiver."""

    def __init__(
        self, device: str, seed: int, config: CacheTransceiverConfig = DEFAULT, stall_timeout_s: float = 2.0
    ) -> None:
        torch.cuda.set_device(device)
        self.tensor = new_pool(device, seed)
        self.events: queue.Queue[Any] = queue.Queue()
        self.transceiver = Transceiver(
            KvPoolView((self.tensor,), LAYOUT),
            config,
            TransceiverOptions("context-0", stall_timeout_s=stall_timeout_s),
            self.events.put,
            exports=Exports(),
        )
        self.exporter = Exporter(self.transceiver)
        self.transceiver.start()

    def hand_over(self, request_id: str, to: KvAddress, blocks: list[int]) -> float:
        """Seconds from the end of prefill to the blocks being free."""
        key = Key(request_id, 0)
        self.exporter.offer(key, to, len(blocks) * 32, (blocks,))
        began_s = time.perf_counter()
        self.exporter.finish(key, 1)
        assert self.events.get(timeout=WAIT_S) == ExportDone(key)
        return time.perf_counter() - began_s


@contextmanager
def pair(
    devices: tuple[str, str],
    seed: int,
    of: KvLayout = LAYOUT,
    config: CacheTransceiverConfig = DEFAULT,
    stall_timeout_s: float = 2.0,
    receiver: Callable[..., None] = generation,
) -> Iterator[tuple[Context, Connection, KvAddress]]:
    processes = mp.get_context("spawn")
    ours, theirs = processes.Pipe()
    child = processes.Process(target=receiver, args=(theirs, devices[1], of, config, stall_timeout_s), daemon=True)
    child.start()
    context = Context(devices[0], seed, config, stall_timeout_s)
    try:
        assert ours.poll(WAIT_S)
        yield context, ours, ours.recv()
        ours.send(None)
        child.join(WAIT_S)
        assert child.exitcode == 0
    finally:
        context.transceiver.close()
        child.kill()


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("devices", DEVICES)
def test_scattered_blocks_are_bit_exact_and_alone(devices: tuple[str, str], config: CacheTransceiverConfig) -> None:
    with pair(devices, seed=5, config=config) as (context, pipe, address):
        source = torch.randperm(NUM_BLOCKS)[:41].tolist()
        context.hand_over("7", address, source)
        pipe.send((5, source, list(range(7, 48))))
        exact, alone, counts = pipe.recv()
        assert exact
        assert alone
        assert counts[0].bytes == 41 * 4 * MIB
        assert (counts[0].transport == "cuda_ipc") or not config.direct_reads


@pytest.mark.parametrize("devices", DEVICES)
def test_a_receiver_that_may_keep_no_more_mappings_still_receives(devices: tuple[str, str]) -> None:
    staged = CacheTransceiverConfig(direct_reads=False)
    with pair(devices, seed=5, config=staged, receiver=generation_without_mappings) as (context, pipe, address):
        source = torch.randperm(NUM_BLOCKS)[:41].tolist()
        for first in (7, 50, 100):
            context.hand_over(f"{first}", address, source)
        pipe.send((5, source, [*range(7, 48), *range(50, 91), *range(100, 141)]))
        assert pipe.recv()[1], "nothing else was written to"
        pipe.send((5, source, list(range(100, 141))))
        assert pipe.recv()[0]


@pytest.mark.parametrize("devices", DEVICES)
def test_another_block_size_and_type_on_the_other_side(devices: tuple[str, str]) -> None:
    with pair(devices, seed=5, of=OTHER_LAYOUT) as (context, pipe, address):
        source = torch.randperm(NUM_BLOCKS)[:41].tolist()
        context.hand_over("7", address, source)
        pipe.send((5, source, list(range(7, 89))))
        exact, alone, counts = pipe.recv()
        assert exact
        assert alone
        assert counts[0].bytes == 41 * 2 * MIB


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("devices", DEVICES)
def test_kv_is_pushed_only_after_the_kernels_that_make_it(
    devices: tuple[str, str], config: CacheTransceiverConfig
) -> None:
    with pair(devices, seed=5, config=config) as (context, pipe, address):
        source = list(range(20))
        made = new_pool(devices[0], seed=6)
        torch.cuda._sleep(400_000_000)  # the prefill: a fifth of a second on the engine's stream
        context.tensor.copy_(made)
        context.hand_over("0", address, source)
        pipe.send((6, source, source))
        exact, alone, _ = pipe.recv()
        assert exact
        assert alone


@pytest.mark.parametrize("devices", DEVICES)
def test_a_reader_whose_own_stream_is_busy_for_long_gets_the_time(devices: tuple[str, str]) -> None:
    """For longer than the sender promises at first."""
    with pair(devices, seed=5) as (context, pipe, address):
        context.hand_over("0", address, list(range(3)))
        assert context.hand_over("0-busy", address, list(range(20))) > 2.0
        pipe.send((5, list(range(20)), list(range(20))))
        assert pipe.recv()[:2] == (True, True)


@pytest.mark.parametrize(
    "config", [CacheTransceiverConfig(checksum=True, direct_reads=reads) for reads in (True, False)]
)
@pytest.mark.parametrize("devices", DEVICES)
def test_checksums_hold_up_neither_side(devices: tuple[str, str], config: CacheTransceiverConfig) -> None:
    """1 GiB where a peer may be silent for half a second, as 4 GiB where it may for two."""
    blocks = list(range(256))
    with pair(devices, seed=5, config=config, stall_timeout_s=0.5) as (context, pipe, address):
        context.hand_over("0", address, blocks)
        pipe.send((5, blocks, blocks))
        assert pipe.recv()[:2] == (True, True)


@pytest.mark.parametrize("devices", DEVICES)
def test_a_mapping_that_reads_something_else_is_given_up_for_staging(
    devices: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = peer_memory._write_nonce

    def write_another(pool: torch.Tensor) -> bytes:
        write(pool)
        return bytes(peer_memory.NONCE_BYTES)

    monkeypatch.setattr(peer_memory, "_write_nonce", write_another)
    source = list(range(41))
    with pair(devices, seed=5) as (context, pipe, address):
        context.hand_over("7", address, source)
        pipe.send((5, source, list(range(7, 48))))
        exact, alone, counts = pipe.recv()
        assert exact
        assert alone
        assert counts[0].transport != "cuda_ipc", "as it is where KV is read"


@pytest.mark.parametrize("devices", DEVICES)
def test_a_pool_that_claims_more_than_its_allocation_is_refused(
    devices: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = peer_memory.publish

    def publish_more(pool: torch.Tensor) -> peer_memory.PoolName | None:
        name = publish(pool)
        return name and msgspec.structs.replace(name, num_blocks=name.num_blocks + 10)

    monkeypatch.setattr(peer_memory, "publish", publish_more)
    with pair(devices, seed=5) as (context, _, address):
        context.exporter.offer(Key("0", 0), address, 32, ([0],))
        assert context.events.get(timeout=WAIT_S).error.reason == "protocol"


def context_worker(
    pipe: Connection, device: str, address: KvAddress, request_id: str, computed: int, config: CacheTransceiverConfig
) -> None:
    """The child: sends `computed` of 8192 tokens, finishes if that is all of them, and waits to be told to end."""
    context = Context(device, seed=8, config=config)
    key = Key(request_id, 0)
    context.exporter.offer(key, address, 8192, (range(256),))
    context.exporter.computed(key, computed)
    if computed == 8192:
        context.exporter.finish(key, 1)
    pipe.recv()


@contextmanager
def started(target: Any, *arguments: Any) -> Iterator[tuple[Any, Connection]]:
    """A child process and the pipe to it; killed in the end."""
    processes = mp.get_context("spawn")
    ours, theirs = processes.Pipe()
    child = processes.Process(target=target, args=(theirs, *arguments), daemon=True)
    child.start()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join(WAIT_S)


def wait_for(happened: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"


def wait_for_staging(of: Transceiver) -> None:
    """A buffer whose payload the loss of a connection has ended comes back in the loop's next turn, after the event."""
    wait_for(lambda: of.staging_in_use_bytes == 0, "every buffer is free", timeout_s=1.0)


def asked(pipe: Connection, question: str) -> Any:
    pipe.send(question)
    return pipe.recv()


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_generation_worker_survives_the_death_of_a_context_worker(
    devices: tuple[str, str], config: CacheTransceiverConfig
) -> None:
    torch.cuda.set_device(devices[0])
    tensor, events = new_pool(devices[0], None), queue.Queue[Any]()
    gen = Transceiver(
        KvPoolView((tensor,), LAYOUT),
        config,
        TransceiverOptions("generation-0", "127.0.0.1"),
        events.put,
        imports=Imports(),
    )
    importer = Importer(gen)
    address = gen.start()
    try:
        with started(context_worker, devices[1], address, "first", 8191, config) as (child, _):
            importer.accept(events.get(timeout=WAIT_S).key, (range(256),), 0)
            wait_for(lambda: bytes_in(gen), "payload comes")
            child.kill()
            assert events.get(timeout=5.0).error.reason == "peer_lost"
            wait_for_staging(gen)
        with started(context_worker, devices[1], address, "second", 8192, config):
            importer.accept(events.get(timeout=WAIT_S).key, (range(256),), 0)
            assert events.get(timeout=WAIT_S) == ImportDone(Key("second", 0), 1)
        assert torch.equal(as_bytes(tensor)[:256], as_bytes(new_pool(devices[0], 8))[:256])
    finally:
        gen.close()


@pytest.mark.parametrize("config", WAYS)
@pytest.mark.parametrize("devices", DEVICES)
def test_a_context_worker_survives_the_death_of_a_generation_worker(
    devices: tuple[str, str], config: CacheTransceiverConfig
) -> None:
    context, blocks = Context(devices[0], 5, config), list(range(256))
    try:
        with started(generation, devices[1], LAYOUT, config) as (child, pipe):
            context.exporter.offer(Key("0", 0), pipe.recv(), 8192, (blocks,))
            context.exporter.computed(Key("0", 0), 8191)
            wait_for(lambda: asked(pipe, "bytes"), "payload comes")
            child.kill()
            assert context.events.get(timeout=5.0).error.reason == "peer_lost"
            wait_for_staging(context.transceiver)
        with started(generation, devices[1], LAYOUT, config) as (_, pipe):
            context.hand_over("0", pipe.recv(), blocks)
            pipe.send((5, blocks, blocks))
            assert pipe.recv()[:2] == (True, True)
    finally:
        context.transceiver.close()


@pytest.mark.parametrize("devices", DEVICES)
def test_rates(devices: tuple[str, str]) -> None:
    with pair(devices, seed=5) as (context, _, address):
        for i in range(10):
            context.hand_over(f"0-warm{i}", address, list(range(256)))
        for size in (4 * MIB, 20 * MIB, 128 * MIB, 1024 * MIB):
            blocks = list(range(size // (4 * MIB)))
            took_s = statistics.median(context.hand_over(f"0-{size}-{i}", address, blocks) for i in range(15))
            print(f"\n{size // MIB:5d} MiB in {took_s * 1e3:6.2f} ms: {size / took_s / 1e9:6.1f} GB/s")
            assert size / took_s > 1e9

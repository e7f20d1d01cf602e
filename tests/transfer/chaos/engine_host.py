"""A whole engine with its transceiver, in a thread of its own, as one of a proxy's workers.

The runner is the fake one, whose KV are hashes of the history; here they stand in a pool's tensor, from where the
transceiver takes them. So the other engine finds them right after a handoff, or says so.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgspec
import torch

from context_worker.exporter import Exporter
from context_worker.handoffs import Exports
from generation_worker.handoffs import Imports
from generation_worker.importer import Importer
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView
from kv_transfer.options import TransceiverOptions
from kv_transfer.transceiver import Transceiver
from pdserve.config import CacheTransceiverConfig
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import GenerateRequest, Key, OutputFrame
from tests.fakes.fake_runner import SMALL_LIMITS, FakeRunner
from tests.transfer.chaos.script import Script, ScriptedNetwork
from tests.unit.engine_bench import Client

TIMEOUT_S = 0.8
STALL_S = 0.3
BLOCKS = 40
HOST_BLOCKS = 6


class PooledKv:
    """A pool of `FakeRunner` as blocks: (block, offset) holds a position where K belongs, and a chain for V."""

    def __init__(self, num_blocks: int, tokens_per_block: int) -> None:
        self.tensor = torch.full((num_blocks, 1, 2, 1, tokens_per_block, 1), -1, dtype=torch.int64)
        self._values = self.tensor.numpy()

    def get(self, slot: tuple[int, int], default: object = None) -> tuple[int, int]:
        position, chain = self._values[slot[0], 0, :, 0, slot[1], 0].tolist()
        return position, chain

    def __setitem__(self, slot: tuple[int, int], value: tuple[int, int]) -> None:
        self._values[slot[0], 0, :, 0, slot[1], 0] = value


class EngineHost:
    """What the proxy sees as a `WorkerLink`. `loop` is the proxy's; a step takes `step_s`."""

    def __init__(
        self,
        worker_id: str,
        phase: Any,
        tokens_per_block: int,
        script: Script,
        loop: asyncio.AbstractEventLoop,
        port: int = 0,
        *,
        timeout_s: float = TIMEOUT_S,
        stall_timeout_s: float = STALL_S,
        max_batch_size: int = SMALL_LIMITS.max_batch_size,
        step_s: float = 0.0,
    ) -> None:
        self.worker_id = worker_id
        limits = msgspec.structs.replace(SMALL_LIMITS, num_blocks=BLOCKS, tokens_per_block=tokens_per_block)
        limits = msgspec.structs.replace(limits, max_batch_size=max_batch_size)
        self.runner = FakeRunner(limits, num_host_blocks=HOST_BLOCKS)
        self._step_s = step_s
        kv = PooledKv(BLOCKS, tokens_per_block)
        self.runner.pools[0] = kv  # type: ignore[call-overload]
        group = GroupLayout(
            num_layers=1,
            kv_factor=2,
            num_kv_heads=1,
            tokens_per_block=tokens_per_block,
            head_dim=1,
            dtype="int64",
        )
        self._network = ScriptedNetwork(worker_id, script)
        self.transceiver = Transceiver(
            KvPoolView((kv.tensor,), KvLayout(model="m", groups=(group,))),
            CacheTransceiverConfig(
                backend="LOOPBACK",
                kv_transfer_timeout_ms=round(timeout_s * 1000),
                max_tokens_in_buffer=32,
                checksum=True,
            ),
            TransceiverOptions(
                worker_id,
                port=port,
                stall_timeout_s=stall_timeout_s,
                network=lambda config, device: self._network,
            ),
            lambda event: self.engine.post(event),
            exports=Exports() if phase == "context" else None,
            imports=Imports() if phase == "generation" else None,
        )
        self._woken = threading.Event()
        exporter = Exporter(self.transceiver) if phase == "context" else None
        importer = Importer(self.transceiver) if phase == "generation" else None
        self.engine = Engine(self.runner, EngineOptions(), wake=self._woken.set, exporter=exporter, importer=importer)
        address = self.transceiver.start()
        self.port = address.port
        if self.port:
            script.workers[self.port] = worker_id
        self.info = SimpleNamespace(kv=SimpleNamespace(address=lambda: address))
        self.client = Client()
        self.submitted: set[Key] = set()
        self._loop = loop
        self._listeners: dict[Key, Any] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name=worker_id, daemon=True)
        self._thread.start()

    def submit(self, request: GenerateRequest, listener: Any) -> None:
        self._listeners[request.key] = listener
        self.submitted.add(request.key)
        self._call(lambda: self.engine.submit(request))

    def abort(self, key: Key) -> None:
        self._call(lambda: self.engine.abort(key))

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer of the engine's thread."""
        answer: Future[Any] = Future()

        def call() -> None:
            try:
                answer.set_result(question())
            except Exception as error:
                answer.set_exception(error)

        self._call(call)
        return answer.result(10)

    def is_quiet(self) -> bool:
        moving = any(counts.in_flight for counts in self.transceiver.counts())
        idle: bool = self.ask(lambda: self.engine.is_idle)
        return idle and not moving and not self.transceiver.staging_in_use_bytes

    def assert_at_rest(self) -> None:
        """No block is in use, and each attempt that was submitted has had its one end."""
        self.ask(self.engine.check)
        blocks = self.ask(self.engine.stats).blocks
        assert blocks.available == blocks.total, f"{self.worker_id}: {blocks}"
        assert not self.runner.mistakes, self.runner.mistakes
        assert set(self.client.finished) == self.submitted, f"{self.worker_id}: a request did not end, or was not asked"

    def freeze(self, seconds: float) -> None:
        """The transceiver's thread stands still; the engine does not."""
        self.transceiver._loop.call_soon_threadsafe(time.sleep, seconds)

    def die(self) -> None:
        """In the proxy's loop: every link and socket breaks at once."""
        self.transceiver._loop.call_soon_threadsafe(self._network.sever)
        listeners, self._listeners = self._listeners, {}
        self.close()
        for listener in listeners.values():
            listener.on_lost(self)

    def close(self) -> None:
        self._ending = True
        self._woken.set()
        self._thread.join(10)
        self.transceiver.close()

    def _call(self, call: Callable[[], None]) -> None:
        self._calls.append(call)
        self._woken.set()

    def _run(self) -> None:
        while not self._ending:
            self._woken.clear()
            while self._calls:
                self._calls.popleft()()
            if self.engine.has_work:
                frame = self.engine.step()
                time.sleep(self._step_s)
                self.client.take(frame)
                self._loop.call_soon_threadsafe(self._deliver, frame)
            elif not self._calls:
                self._woken.wait(0.05)

    def _deliver(self, frame: OutputFrame) -> None:
        """In the proxy's loop."""
        for delta in frame.deltas:
            if (listener := self._listeners.get(delta.key)) is not None:
                listener.on_delta(self, delta, time.perf_counter())
        for finished in frame.finished:
            if (listener := self._listeners.pop(finished.key, None)) is not None:
                listener.on_finished(self, finished)

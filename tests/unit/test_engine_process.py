"""The engine's main loop, in a thread over real ZMQ pipes; its end, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from pdserve.engine.hosts import process as process_module
from pdserve.engine.hosts.process import EngineProcess, EngineService
from pdserve.engine.run import heartbeat
from pdserve.engine.run.heartbeat import HangDetector
from pdserve.engine.schedule.engine import Engine
from pdserve.errors import ConfigError, TransferError
from pdserve.handoff import ImportFailed, KvImporter
from pdserve.process import PARENT_VARIABLE
from pdserve.protocol import (
    AbortRequest,
    EngineAlive,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    Key,
    OutputFrame,
    Shutdown,
    ToEngine,
    encode,
    from_engine_decoder,
)
from tests.fakes.engine_child import HANGS
from tests.fakes.fake_link import FakeLink
from tests.fakes.fake_runner import FakeRunner, expected_output
from tests.frames import NO_MESSAGES
from tests.unit.engine_bench import PROMPT, Client, request

TIMEOUT_S = 60.0


class Server:
    """The server's ends of the pipes."""

    def __init__(self, folder: Path) -> None:
        self.addresses = (f"ipc://{folder}/to", f"ipc://{folder}/from")
        self._context = zmq.Context()
        self._to, self._from = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        for pipe in (self._to, self._from):
            pipe.linger = 0
        self._to.connect(self.addresses[0])
        self._from.bind(self.addresses[1])

    def send(self, message: ToEngine | bytes) -> None:
        self._to.send(message if isinstance(message, bytes) else encode(message))

    def receive(self, timeout_s: float = TIMEOUT_S) -> FromEngine | None:
        """What comes next but for heartbeats, if it comes in time."""
        deadline = time.monotonic() + timeout_s
        while self._from.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            message = from_engine_decoder.decode(self._from.recv())
            if not isinstance(message, EngineAlive):
                return message
        return None

    def count_beats(self, count: int) -> int:
        """How many of the next `count` messages are heartbeats, but for stats."""
        seen = [
            from_engine_decoder.decode(self._from.recv()) for _ in range(count) if self._from.poll(TIMEOUT_S * 1000)
        ]
        return sum(isinstance(message, (EngineAlive, EngineStats)) for message in seen)

    def beats_in(self, seconds: float) -> int:
        """How many heartbeats come in that time."""
        deadline, beats = time.monotonic() + seconds, 0
        while self._from.poll(max(0, int((deadline - time.monotonic()) * 1000))):
            beats += isinstance(from_engine_decoder.decode(self._from.recv()), EngineAlive)
        return beats

    def until(self, done: Callable[[FromEngine], Any]) -> list[FromEngine]:
        """All messages up to the first for which `done`."""
        messages: list[FromEngine] = []
        while True:
            message = self.receive()
            assert message is not None, f"nothing more came after {messages[-3:]}"
            messages.append(message)
            if done(message):
                return messages

    def close(self) -> None:
        self._to.close()
        self._from.close()
        self._context.term()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


class InThread:
    """An `EngineProcess` in a thread; `status` is what `run` returned."""

    def __init__(self, server: Server, runner: FakeRunner | None = None, importer: KvImporter | None = None) -> None:
        self.runner = runner or FakeRunner()
        self.importer = importer
        self.engine: Engine | None = None
        self.closed = False
        self.staging_bytes = 77
        self.status: int | None = None
        self.process = EngineProcess(self._start, *server.addresses)
        self._thread = threading.Thread(target=self._run)

    def _start(self, wake: Callable[[], None]) -> EngineService:
        self.engine = Engine(self.runner, wake=wake, importer=self.importer)
        return EngineService(
            self.engine,
            EngineReady(limits=self.runner.limits, dtype="none", device="none"),
            complete_stats=lambda stats: msgspec.structs.replace(stats, staging_bytes=self.staging_bytes),
            close=self._close,
        )

    def _close(self) -> None:
        self.closed = True

    def _run(self) -> None:
        self.status = self.process.run()

    def __enter__(self) -> InThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()


def is_finished(message: FromEngine) -> bool:
    return isinstance(message, OutputFrame) and bool(message.finished)


def test_ready_comes_first_then_frames_then_the_stats_of_the_idle_engine(server: Server) -> None:
    with InThread(server) as engine:
        assert isinstance(server.receive(), EngineReady)
        server.send(request())
        client = Client()
        for message in server.until(is_finished):
            if isinstance(message, OutputFrame):
                client.take(message)
        assert client.tokens() == expected_output(PROMPT, request().sampling, engine.runner.limits)[0]
        stats = server.until(lambda each: isinstance(each, EngineStats) and each.steps == 6 and not each.running)[-1]
        assert isinstance(stats, EngineStats)
        assert stats.staging_bytes == 77
        assert (stats.prefill_tokens, stats.decode_tokens) == (5, 5)
        assert server.receive(0.3) is None, "an idle engine says nothing"
        engine.staging_bytes = 78
        stats = server.receive()
        assert isinstance(stats, EngineStats), "unless its mover has something new"
        assert stats.staging_bytes == 78


def test_stats_come_at_most_every_100_ms(server: Server) -> None:
    with InThread(server):
        server.until(lambda each: isinstance(each, EngineStats))
        began_s = time.monotonic()
        seen = 0
        for index in range(30):
            server.send(request(f"r{index}"))
            seen += sum(isinstance(each, EngineStats) for each in server.until(is_finished))
        assert seen <= 1 + (time.monotonic() - began_s) / 0.1


def test_abort_reaches_the_engine_and_garbage_does_not_end_it(server: Server) -> None:
    with InThread(server):
        for frame in NO_MESSAGES:
            server.send(frame)
        server.send(request("long", max_tokens=1000))
        server.send(AbortRequest(Key("long", 0)))
        output = server.until(is_finished)[-1]
        assert isinstance(output, OutputFrame)
        assert output.finished[0].reason in ("abort", "length")
        server.send(request("next"))
        server.until(is_finished)


def test_shutdown_finishes_what_is_open_as_retryable(server: Server) -> None:
    link = FakeLink(FakeRunner(), FakeRunner())
    with InThread(server, importer=link.importer) as engine:
        server.send(request(phase="generation"))
        server.until(lambda each: isinstance(each, EngineStats) and each.awaiting_kv)
        server.send(Shutdown())
        frame = server.until(is_finished)[-1]
        assert isinstance(frame, OutputFrame)
        error = frame.finished[0].error
        assert error is not None
        assert (error.code, error.retryable) == ("draining", True)
        engine.join()
        assert (engine.status, engine.closed) == (0, True)


def test_an_event_or_a_deadline_wakes_a_sleeping_engine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "_IDLE_TICK_S", 60.0)
    link = FakeLink(FakeRunner(), FakeRunner())
    with InThread(server, importer=link.importer) as engine:
        for name, timeout_s in (("event", 60.0), ("deadline", 0.4)):
            server.send(request(name, phase="generation", timeout_s=timeout_s))
        server.until(lambda each: isinstance(each, EngineStats) and each.awaiting_kv == 2)
        assert engine.engine is not None
        engine.engine.post(ImportFailed(Key("event", 0), TransferError("gone", "peer_lost")))
        server.until(is_finished)
        frame = server.until(is_finished)[-1]
        assert isinstance(frame, OutputFrame)
        error = frame.finished[0].error
        assert error is not None
        assert error.code == "deadline_exceeded"


def test_its_heart_beats_while_it_idles_and_while_a_step_takes_long(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    go_on = threading.Event()
    launch = FakeRunner.launch

    def slow_launch(self: FakeRunner, *args: Any) -> Any:
        assert go_on.wait(TIMEOUT_S)
        return launch(self, *args)

    monkeypatch.setattr(FakeRunner, "launch", slow_launch)
    with InThread(server):
        assert isinstance(server.receive(), EngineReady)
        assert server.count_beats(10) == 10
        server.send(request())
        assert server.count_beats(10) == 10
        go_on.set()
        server.until(is_finished)


def test_an_idle_engine_does_not_spin(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    polls: list[float] = []
    poll = zmq.Poller.poll

    def counted(self: zmq.Poller, timeout: int | None = None) -> Any:
        polls.append(time.monotonic())
        return poll(self, timeout)

    link = FakeLink(FakeRunner(), FakeRunner())
    with InThread(server, importer=link.importer):
        server.send(request(phase="generation"))
        server.until(lambda each: isinstance(each, EngineStats) and each.awaiting_kv)
        monkeypatch.setattr(zmq.Poller, "poll", counted)
        time.sleep(0.5)
        assert len(polls) <= 6
        monkeypatch.undo()


def test_a_configuration_error_at_the_start_is_told_and_has_its_own_status(server: Server) -> None:
    def start(_: Callable[[], None]) -> EngineService:
        raise ConfigError("dtype: no such type", "dtype")

    assert EngineProcess(start, *server.addresses).run() == 2
    message = server.receive()
    assert isinstance(message, EngineFailed)
    assert (message.error.code, message.error.param) == ("config_error", "dtype")


def test_an_unexpected_error_at_the_start_is_told_without_its_text(server: Server) -> None:
    def start(_: Callable[[], None]) -> EngineService:
        raise RuntimeError("secret")

    assert EngineProcess(start, *server.addresses).run() == 1
    message = server.receive()
    assert isinstance(message, EngineFailed)
    assert message.error.code == "engine_error"
    assert "secret" not in message.error.message


def test_steps_that_keep_failing_end_the_process(server: Server) -> None:
    runner = FakeRunner()
    runner.is_dead = True
    with InThread(server, runner) as engine:
        server.send(request("r"))
        frame = server.until(is_finished)[-1]
        assert isinstance(frame, OutputFrame)
        assert frame.finished[0].reason == "error"
        server.until(lambda each: isinstance(each, EngineFailed))
        engine.join()
        assert (engine.status, engine.closed) == (1, True)


def test_a_broken_invariant_is_found_when_the_engine_is_idle(server: Server) -> None:
    with InThread(server) as engine:
        server.send(request())
        server.until(is_finished)
        assert engine.engine is not None
        engine.engine._blocks.groups[0]._free.pop()
        server.until(lambda each: isinstance(each, EngineFailed))
        engine.join()
        assert engine.status == 1


def _argv(server: Server) -> list[str]:
    return [sys.executable, "-m", "tests.fakes.engine_child", *server.addresses]


def test_a_step_that_never_ends_ends_the_process(server: Server) -> None:
    process = subprocess.Popen([*_argv(server), "1"], stderr=subprocess.PIPE)
    try:
        assert isinstance(server.receive(30), EngineReady)
        server.send(request())
        server.until(is_finished)
        time.sleep(1.5)
        assert process.poll() is None, "idle is not hanging"
        server.send(request("hangs", HANGS))
        failed = server.until(lambda each: isinstance(each, EngineFailed))[-1]
        assert isinstance(failed, EngineFailed)
        assert "has not ended within 1 s" in failed.error.message
        _, said = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 1
        assert b"in launch" in said, "where it hangs"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("timeout_s", [2.0, None])
def test_only_one_and_the_same_step_is_too_long(timeout_s: float | None) -> None:
    detector = HangDetector(timeout_s)
    for _ in range(20):
        assert not detector.beat()
        with detector:
            assert not any(detector.beat() for _ in range(4))
    with detector:
        beats = [detector.beat() for _ in range(6)]
    assert beats == [timeout_s is not None and number >= 4 for number in range(6)]
    assert not detector.beat()


def test_sigterm_ends_the_process_in_order(server: Server) -> None:
    process = subprocess.Popen(_argv(server))
    try:
        assert isinstance(server.receive(30), EngineReady)
        process.send_signal(signal.SIGINT)
        server.send(request())
        server.until(is_finished)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("asked_the_kernel", [True, False])
def test_the_process_ends_with_its_parent(server: Server, asked_the_kernel: bool) -> None:
    if asked_the_kernel and not sys.platform.startswith("linux"):
        pytest.skip("no prctl here")
    variable = f"env['{PARENT_VARIABLE}'] = str(os.getpid())" if asked_the_kernel else "pass"
    code = f"import os, subprocess, sys\nenv = dict(os.environ)\n{variable}\nsubprocess.run(sys.argv[1:], env=env)"
    environment = {key: value for key, value in os.environ.items() if key != PARENT_VARIABLE}
    parent = subprocess.Popen([sys.executable, "-c", code, *_argv(server)], env=environment)
    engine: psutil.Process | None = None
    try:
        ready = server.receive(30)
        assert isinstance(ready, EngineReady)
        engine = psutil.Process(ready.pid)
        parent.kill()
        parent.wait()
        psutil.wait_procs([engine], timeout=TIMEOUT_S)
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    finally:
        parent.kill()
        parent.wait()
        if engine is not None and engine.is_running():
            engine.kill()

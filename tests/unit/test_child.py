"""When `pdserve up` starts a process again, and when it gives up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from pdserve import child as child_module
from pdserve.child import Child
from pdserve.process import EXIT_ADDRESS, EXIT_CONFIG, INSTANCE_VARIABLE
from tests.manager import until


class Told(Child):
    """A child whose log can be looked at, with hardly a pause between two starts."""

    def __init__(self, script: str, argv: list[str] | None = None) -> None:
        self.lines: list[str] = []
        environment = {"PATH": "/usr/bin:/bin"}
        super().__init__("c", argv or ["/bin/sh", "-c", script], environment, b"model: m\n", 1, (0.01,))

    def say(self, text: str) -> None:
        self.lines.append(text)

    def restarts(self) -> int:
        return sum("restarting" in line for line in self.lines)


def said_by(folder: Path) -> list[str]:
    return [file.read_text() for file in folder.iterdir()]


async def ended(child: Child, condition: Callable[[], bool]) -> None:
    """Run `child` until the condition holds, then end it."""
    running = asyncio.create_task(child.run())
    await until(condition, limit_s=30)
    child.signal(signal.SIGTERM)
    await asyncio.wait_for(running, 30)


@pytest.mark.parametrize("status", [EXIT_CONFIG, EXIT_ADDRESS])
async def test_a_status_that_another_start_would_not_change_is_fatal(status: int) -> None:
    child = Told(f"exit {status}")
    await asyncio.wait_for(child.run(), 30)
    assert child.fatal_status == status
    assert child.restarts() == 0


@pytest.mark.parametrize("status", [EXIT_CONFIG, EXIT_ADDRESS])
async def test_a_configuration_that_has_worked_is_not_at_fault(status: int) -> None:
    child = Told(f"exit {status}")
    child.was_ready = True
    await ended(child, lambda: child.restarts() >= 2)
    assert child.fatal_status is None


@pytest.mark.parametrize(("end", "said"), [("exit 1", "status 1"), ("exit 0", "status 0"), ("kill -9 $$", "SIGKILL")])
async def test_any_other_end_is_followed_by_a_start(end: str, said: str) -> None:
    child = Told(end)
    await ended(child, lambda: child.restarts() >= 2)
    assert child.fatal_status is None
    assert any(said in line and "restarting" in line for line in child.lines)


async def test_a_process_that_can_t_be_started_is_tried_again() -> None:
    child = Told("", ["/nowhere/at/all"])
    await ended(child, lambda: child.restarts() >= 2)
    assert child.fatal_status is None
    assert "could not be started" in child.lines[0]


async def test_a_pipe_that_can_t_be_had_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_descriptors(_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(child_module.OutputPipe, "open", no_descriptors)
    child = Told("exit 0")
    await ended(child, lambda: child.restarts() >= 2)
    assert "Too many open files" in child.lines[0]


async def test_each_start_gets_the_configuration_and_an_identity_of_its_own(tmp_path: Path) -> None:
    child = Told(f"cat > {tmp_path}/$$; echo ${INSTANCE_VARIABLE}")
    await ended(child, lambda: child.restarts() >= 2)
    said = [line for line in child.lines if len(line) == 32]
    assert len(set(said)) == len(said) >= 2
    assert said_by(tmp_path).count("model: m\n") >= 2


async def test_a_signal_that_comes_while_a_process_is_being_started_is_not_lost() -> None:
    child = Told("sleep 60")
    running = asyncio.create_task(child.run())
    await asyncio.sleep(0)  # `run` waits for the start
    assert child._process is None
    child.signal(signal.SIGTERM)
    await asyncio.wait_for(running, 30)
    assert child.restarts() == 0

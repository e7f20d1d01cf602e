"""Log lines: their form, and that nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pdserve.log_output import LineFormatter, LineWriter, LogHandler, OutputPipe, escaped


def filled_pipe() -> tuple[int, int]:
    """A pipe that takes no more, as one whose reader has stopped reading."""
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(theirs, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(theirs, b"x" * 4096)
    os.set_blocking(theirs, True)
    return ours, theirs


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ours, theirs = os.pipe()
    yield ours, theirs
    for descriptor in (ours, theirs):
        os.close(descriptor)


def read_lines(descriptor: int, count: int) -> list[str]:
    data = b""
    while data.count(b"\n") < count:
        data += os.read(descriptor, 1 << 16)
    return data.decode().splitlines()


def test_lines_come_out_in_order(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    for number in range(100):
        writer.write(f"line {number}")
    assert writer.flush(10)
    assert read_lines(pipe[0], 100) == [f"line {number}" for number in range(100)]


def test_a_pipe_that_nobody_reads_holds_nobody_up_and_what_was_lost_is_said() -> None:
    ours, theirs = filled_pipe()
    writer = LineWriter(theirs, queue_bytes=1000)
    for _ in range(1000):
        writer.write("a line of twenty characters"[:20])
    assert not writer.flush(0.01), "nothing can leave"
    text = b""
    while not text.endswith(b"the end\n"):
        text += os.read(ours, 1 << 16)
        if writer.flush(10):
            writer.write("the end")
            assert writer.flush(10)
    lines = text.decode().lstrip("x").splitlines()
    lost = [int(line[1:].partition(" ")[0]) for line in lines if line.endswith("lines of the log were lost here)")]
    kept = lines.count("a line of twenty cha")
    assert lines[0] == "a line of twenty cha"
    assert lost
    assert kept + sum(lost) == 1000
    assert len(lines) == kept + len(lost) + 1
    assert lines[-1] == "the end"
    os.close(ours)


def test_a_reader_that_is_gone_is_no_error_and_losses_are_counted(pipe: tuple[int, int]) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    writer = LineWriter(theirs)
    for _ in range(3):
        writer.write("nobody reads this")
        assert writer.flush(10)
    os.dup2(pipe[1], theirs)  # somebody reads again
    writer.write("this is read")
    assert writer.flush(10)
    assert read_lines(pipe[0], 2) == ["(3 lines of the log were lost here)", "this is read"]


def test_a_full_disk_is_no_error() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    writer = LineWriter(full)
    writer.write("no room for this")
    assert writer.flush(10)
    os.close(full)


def test_a_pipe_that_somebody_made_nonblocking_loses_nothing(pipe: tuple[int, int]) -> None:
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(pipe[1], False)
    writer = LineWriter(pipe[1])
    expected = [f"{number:0100d}" for number in range(200)]
    for line in expected:
        writer.write(line)
    assert read_lines(pipe[0], 200) == expected


def test_a_signal_handler_may_log_while_its_thread_logs(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])

    class Nested(str):
        def encode(self, *_: object, **__: object) -> bytes:
            return b"outer"

    def inside() -> None:
        with writer._changed:
            writer.write(Nested("x"))
            writer.write("inner")

    thread = threading.Thread(target=inside, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert read_lines(pipe[0], 2) == ["outer", "inner"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n12:00:00 INFO pdserve: all is well", r"a\n12:00:00 INFO pdserve: all is well"),
        ("\x1b[2Jgone\r\x00\x7f\x9b", r"\x1b[2Jgone\r\x00\x7f\x9b"),
        ("one\u2028two\u202e", r"one\u2028two\u202e"),
        ("tab\tand höflich 日本 🙂", "tab\tand höflich 日本 🙂"),
    ],
)
def test_what_a_peer_says_begins_no_line_and_moves_no_cursor(text: str, line: str) -> None:
    assert escaped(text) == line
    record = logging.LogRecord("x", logging.INFO, "f.py", 1, "peer %s", (text,), None)
    assert LineFormatter().format(record).endswith(f" INFO x: peer {line}")


def test_an_endless_field_is_cut() -> None:
    assert escaped("y" * 10_000_000).endswith("more characters)")
    assert len(escaped("y" * 10_000_000)) < 20_000


def test_a_traceback_keeps_its_lines_and_none_of_them_looks_like_an_event() -> None:
    try:
        raise ValueError("bad\n12:00:00 INFO pdserve: forged\x1b")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f.py", 1, "it failed", (), sys.exc_info())
    first, *rest = LineFormatter().format(record).splitlines()
    assert first.endswith("ERROR x: it failed")
    assert len(rest) >= 4
    assert all(line.startswith("  ") for line in rest)
    assert "\x1b" not in "".join(rest)


def test_a_log_call_that_can_t_be_formatted_is_said_and_not_raised(pipe: tuple[int, int]) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    logger = logging.Logger("broken")
    logger.addHandler(LogHandler(LineWriter(pipe[1])))
    logger.error("%s", Broken())
    logger.error("%d of %d", 1)
    first, second = read_lines(pipe[0], 2)
    assert "test_log_output.py" in first
    assert "no text" in first
    assert "can't be formatted" in second


async def test_another_process_never_waits_for_its_log() -> None:
    """It writes far more than a pipe holds, past Python's streams, and its progress bar is one line."""
    said: list[str] = []
    output = await OutputPipe.open(said.append)
    code = "import os; os.write(2, b'1%\\r50%\\r100%\\r\\n'); [os.write(1, b'z' * 999 + b'\\n') for _ in range(1000)]"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-S", "-c", code), stdout=output.descriptor, stderr=output.descriptor
    )
    output.handed_over()
    assert await asyncio.wait_for(process.wait(), 30) == 0
    await output.finish()
    assert said == ["100%", *["z" * 999] * 1000]


async def test_the_end_of_a_process_is_seen_though_another_holds_its_output() -> None:
    said: list[str] = []
    output = await OutputPipe.open(said.append)
    process = await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", "sleep 30 & echo $!"), stdout=output.descriptor, stderr=output.descriptor
    )
    output.handed_over()
    began_s = time.monotonic()
    assert await asyncio.wait_for(process.wait(), 20) == 0
    await output.finish()
    assert time.monotonic() - began_s < 20
    os.kill(int(said[0]), 9)

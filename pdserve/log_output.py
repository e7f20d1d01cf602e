"""Where log lines go: a descriptor whose reader may be slow, stuck, gone, or a disk that is full.

Owns the form of a line and its way out. Whoever says something never waits and never fails: lines queue for a thread
that writes them, and what finds no room, or can't be written, is counted and told in a later line. Texts come from
peers too, so characters that would begin another line or move a terminal's cursor are written as escapes. The thread
starts with the first line and ends with the process; `flush` gives it a moment for last words.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

_QUEUE_BYTES = 4 << 20
_WRITE_BYTES = 64 << 10
_READ_BYTES = 64 << 10
_LINE_CHARACTERS = 16 << 10
_POLL_MS = 1000
FLUSH_S = 1.0

# C0 and C1 controls, line and paragraph separators, and what turns the direction of text around. A tab may stay.
_CONTROLS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def escaped(text: str) -> str:
    """`text` as one line that moves no cursor, cut where it is absurdly long."""
    if len(text) > _LINE_CHARACTERS:
        text = f"{text[:_LINE_CHARACTERS]}… ({len(text) - _LINE_CHARACTERS} more characters)"
    if text.isprintable():
        return text
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Queued(NamedTuple):
    data: bytes
    lines: int  # that are lost with it; a line about lost ones stands for those


class LineWriter:
    """Lines for one descriptor."""

    def __init__(self, descriptor: int, queue_bytes: int = _QUEUE_BYTES) -> None:
        self._descriptor = descriptor
        self._queue_bytes = queue_bytes
        # A condition's own lock may be taken twice by one thread: signal handlers and finalizers log, too.
        self._changed = threading.Condition()
        self._queue: deque[_Queued] = deque()
        self._queued_bytes = 0
        self._lost_lines = 0
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        """Queue `line`, which has no line end; never blocks and never fails."""
        data = line.encode(errors="backslashreplace") + b"\n"
        with self._changed:
            if self._queued_bytes + len(data) > self._queue_bytes:
                self._lost_lines += 1
                return
            if self._lost_lines:
                self._put(_Queued(f"({self._lost_lines} lines of the log were lost here)\n".encode(), self._lost_lines))
                self._lost_lines = 0
            self._put(_Queued(data, 1))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pdserve-log", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all is written, for so long at most; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queue and not self._is_writing, timeout_s)

    def _put(self, item: _Queued) -> None:
        self._queue.append(item)
        self._queued_bytes += len(item.data)

    def _run(self) -> None:
        while True:
            batch = self._take()
            if not _write_all(self._descriptor, b"".join(item.data for item in batch)):
                with self._changed:
                    self._lost_lines += sum(item.lines for item in batch)

    def _take(self) -> list[_Queued]:
        """What is queued, some of it if it is much; waits for something."""
        with self._changed:
            self._is_writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue)
            self._is_writing = True
            batch, size_bytes = [], 0
            while self._queue and size_bytes < _WRITE_BYTES:
                batch.append(self._queue.popleft())
                size_bytes += len(batch[-1].data)
            self._queued_bytes -= size_bytes
            return batch


@functools.cache
def standard_output() -> LineWriter:
    """The one writer of descriptor 1, for what is a log and not an answer."""
    return LineWriter(1)


@functools.cache
def standard_error() -> LineWriter:
    """The one writer of descriptor 2."""
    return LineWriter(2)


class LineFormatter(logging.Formatter):
    """One line an event; a traceback's lines follow it, indented, so that none of them looks like an event."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.getMessage())
        record.asctime = self.formatTime(record, self.datefmt)
        details = self.formatException(record.exc_info) if record.exc_info else ""
        if record.stack_info:
            details += "\n" + self.formatStack(record.stack_info)
        return "\n".join([self.formatMessage(record), *(f"  {escaped(line)}" for line in details.splitlines())])


class LogHandler(logging.Handler):
    """Gives records to a `LineWriter`. One whose arguments do not fit its text is said by its place."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception as error:  # noqa: BLE001  # what an argument's own `__str__` raises must not end the caller
            text = f"{record.pathname}:{record.lineno}: a log line can't be formatted: {escaped(repr(error))}"
        self._writer.write(text)

    def flush(self) -> None:
        self._writer.flush()


class OutputPipe:
    """What another process writes to its outputs, said line by line.

    Life: `open`; the other process gets `descriptor`; `handed_over` once it has; `finish` when it has ended. The pipe
    is no part of the process for asyncio, which would wait with it for whoever else has inherited the pipe.
    """

    def __init__(self, descriptor: int, transport: asyncio.BaseTransport, relaying: asyncio.Task[None]) -> None:
        self.descriptor = descriptor
        self._transport = transport
        self._relaying = relaying

    @classmethod
    async def open(cls, say: Callable[[str], None]) -> OutputPipe:
        """Raises OSError."""
        ours, theirs = os.pipe()
        stream = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(ours, "rb", buffering=0)
        transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
        return cls(theirs, transport, asyncio.create_task(relay(stream, say)))

    def handed_over(self) -> None:
        """The process has the descriptor, or could not be started: it is no longer needed here."""
        os.close(self.descriptor)

    async def finish(self) -> None:
        """Take the last words, for a moment at most: another process may hold the pipe open."""
        await asyncio.wait({self._relaying}, timeout=FLUSH_S)
        self._relaying.cancel()
        self._transport.close()


async def relay(stream: asyncio.StreamReader, say: Callable[[str], None]) -> None:
    """Give `say` each line that another process writes into `stream`, escaped, until its end.

    The stream is read whatever becomes of the lines, so that the other process never waits for a log. Of what a
    progress bar draws over and over in one line, the last state is taken; a very long line comes in parts.
    """
    rest = b""
    while chunk := await stream.read(_READ_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            say(_readable(line))
        if len(rest) > _LINE_CHARACTERS:
            say(_readable(rest))
            rest = b""
    if rest:
        say(_readable(rest))


def _readable(line: bytes) -> str:
    return escaped(line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))


def _write_all(descriptor: int, data: bytes) -> bool:
    """Write `data`, however long it takes; False if it can't be written."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # somebody who has the same pipe has made it so
            _wait_writable(descriptor)
        except OSError:  # nobody reads, the terminal is gone, the disk is full
            return False
    return True


def _wait_writable(descriptor: int) -> None:
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT)
        poller.poll(_POLL_MS)
    except OSError:
        time.sleep(_POLL_MS / 1000)

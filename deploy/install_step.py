"""Run one step of an installation and say every few seconds what it is at, instead of pip's hundred lines.

    python deploy/install_step.py "what it is, and how long it takes" COMMAND...

On a terminal it is one line that changes. If the command fails, all that it said is printed. For any Python that runs
pip: it needs no package.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO

EVERY_S = 5.0
# What pip says when it begins with something, and how that reads here.
_PHASES = (
    (re.compile(r"Collecting (\S+)"), "looking up {}"),
    (re.compile(r"Downloading (\S+?)(?:\.metadata)? \((.*)\)"), "downloading {} ({})"),
    (re.compile(r"Installing collected packages: (.*)"), "unpacking {} packages"),
    (re.compile(r"Building wheel"), "building"),
    (re.compile(r"Successfully installed"), "done"),
)


def phase_of(line: str) -> str | None:
    """What pip begins with, if `line` says so."""
    for pattern, text in _PHASES:
        if match := pattern.match(line.strip()):
            if "unpacking" in text:
                return text.format(match[1].count(",") + 1)
            return text.format(*(part.rsplit("/", 1)[-1] for part in match.groups()))
    return None


def main(arguments: Sequence[str]) -> int:
    """Run the command; its exit status."""
    what, *command = arguments
    _line(f"{what} ...")
    started_s = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    lines: list[str] = []
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    on_terminal = sys.stdout.isatty()
    show, every_s = (_overwrite, 0.5) if on_terminal else (_line, EVERY_S)
    try:
        while reader.is_alive():
            reader.join(every_s)
            if reader.is_alive():
                show(f"{time.monotonic() - started_s:4.0f} s  {_newest_phase(lines)}")
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        status = 130
    if on_terminal:
        _overwrite("")
    if status != 0:
        sys.stdout.write("".join(lines))
        _line(f"failed: {' '.join(command)}")
    else:
        _line(f"{time.monotonic() - started_s:4.0f} s  done")
    return status


def _read(stream: IO[str], lines: list[str]) -> None:
    lines.extend(iter(stream.readline, ""))


def _newest_phase(lines: Sequence[str]) -> str:
    return next((phase for line in reversed(lines) if (phase := phase_of(line))), "starting")


def _line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _overwrite(text: str) -> None:
    """Show `text` in place of the terminal's newest line, which is not finished."""
    width = shutil.get_terminal_size().columns - 1
    sys.stdout.write(f"\r{text[:width]:<{width}}\r")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

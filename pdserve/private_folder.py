"""A folder for the sockets between processes of one worker, which goes with its owner, however that ends.

The owner holds a lock on a file in it, which the system drops when the owner dies. Whoever makes the next folder
removes those whose lock nobody holds. Locks also tell the living from the dead where process ids do not: in containers
that share the folder for temporary files.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

PREFIX = "pdserve.run-"
_LOCK = "lock"
# A socket's path has 107 bytes; what is put into a folder has a name of up to 15.
_LONGEST_PATH = 90


class PrivateFolder:
    """A new folder, for this user only; exists until `close`, or until its owner is gone and another one is made."""

    def __init__(self) -> None:
        base = _base()
        _remove_abandoned(base)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if (self.path / _LOCK).exists():
                return
            os.close(self._lock)  # taken for an abandoned one, before it was locked

    def close(self) -> None:
        """Remove the folder and what is in it. May be called twice, and from any thread."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def _base() -> Path:
    """The folder for temporary files, or /tmp where a socket's path would become too long."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) + len(PREFIX) + 10 <= _LONGEST_PATH else Path("/tmp")


def _remove_abandoned(base: Path) -> None:
    for folder in base.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's; or somebody else was faster; or its owner lives
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                log.info("removed %s, which a process that was killed had left", folder)
            finally:
                os.close(lock)

"""Stands for an engine process that the nursery has forked: same standard streams, same end."""

from __future__ import annotations

import os
import signal
import sys

from pdserve.process import die_with_parent
from tests.soak.nursery import ROLE_VARIABLE, SOCKET_VARIABLE, Birth, ask_for

if __name__ == "__main__":
    die_with_parent(signal.SIGKILL)
    line = ask_for(os.environ[SOCKET_VARIABLE], Birth(os.environ[ROLE_VARIABLE]))
    status = line.recv(1)
    sys.exit(status[0] if status else 1)

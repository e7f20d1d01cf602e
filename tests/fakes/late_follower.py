"""A follower that listens only after it was told something; what it hears of blocks goes to the file `attachment`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import msgspec
import zmq

from pdserve.engine.run.ranks import messages
from pdserve.engine.run.ranks.messages import Joined, Loaded, MakePool, RankSpec, Stop
from pdserve.process import die_with_parent


def main() -> None:
    die_with_parent()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSpec)
    for report in (Joined(), Loaded(8)):
        os.write(spec.reports, msgspec.json.encode(report) + b"\n")
    time.sleep(0.3)
    with zmq.Context() as context, context.socket(zmq.PULL) as commands:
        commands.bind(spec.commands)
        while not isinstance(command := messages.decode(commands.recv()), Stop):
            if isinstance(command, MakePool):
                Path(spec.attachment).write_text(str(command.num_blocks))


if __name__ == "__main__":
    main()

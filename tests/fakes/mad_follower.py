"""A follower that says what is no report, and stays."""

from __future__ import annotations

import os
import sys
import time

import msgspec

from pdserve.engine.run.ranks.messages import RankSpec
from pdserve.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=RankSpec)
    os.write(spec.reports, b"[" * 100_000 + b"\n")
    time.sleep(3600)

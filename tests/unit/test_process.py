"""What all processes share: what a warm one holds is out of the garbage collector's sight."""

from __future__ import annotations

import subprocess
import sys

_CHILD = """
import gc, weakref
from pdserve.process import freeze_startup_objects
class Node:
    pass
def ring():
    node = Node()
    node.me = node
    return weakref.ref(node)
garbage = ring()
kept = [[] for _ in range(1000)]
freeze_startup_objects()
assert garbage() is None, "what was garbage before is gone, not kept for ever"
assert gc.get_freeze_count() > 1000
assert len(gc.get_objects()) < 1000
later = ring()
gc.collect()
assert later() is None
"""


def test_startup_objects_are_frozen_and_garbage_is_not() -> None:
    subprocess.run([sys.executable, "-c", _CHILD], check=True, timeout=60)

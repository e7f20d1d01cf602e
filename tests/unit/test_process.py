"""What all processes share: the collector does not see what a warm one holds, and threads get their turn soon."""

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


_BESIDE = """
import threading, time
from pdserve.process import share_interpreter_fairly
share_interpreter_fairly()
waits = []
def mover():
    for _ in range(200):
        began = time.perf_counter()
        time.sleep(0.0003)
        waits.append(time.perf_counter() - began - 0.0003)
thread = threading.Thread(target=mover)
thread.start()
while thread.is_alive():
    sum(range(1000))
print(sorted(waits)[100])
"""


def test_a_thread_that_wakes_up_beside_one_that_computes_gets_its_turn_soon() -> None:
    run = subprocess.run([sys.executable, "-c", _BESIDE], check=True, timeout=60, capture_output=True, text=True)
    assert float(run.stdout) < 0.003, "the interpreter's own turns are 5 ms"

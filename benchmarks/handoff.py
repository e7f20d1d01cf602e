"""What does a handoff cost beside its bytes: how much Python is in one, and in each piece of it?

Two transceivers of one process hand tiny blocks over, so that next to nothing is copied. A handoff of one piece and one
of many give what the handoff takes and what each piece adds, in processor time of both ends, which other load hardly
changes. `--direct` reads pieces in place instead of sending them. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.report import warn_if_busy
from context_worker.exporter import Exporter
from context_worker.handoffs import Exports
from generation_worker.handoffs import Imports
from generation_worker.importer import Importer
from kv_transfer import pieces
from kv_transfer.layout import GroupLayout, KvLayout, KvPoolView
from kv_transfer.options import TransceiverOptions
from kv_transfer.transceiver import Transceiver
from pd_kernels.kv_pack import pool_with_margins
from pdserve.config import CacheTransceiverConfig
from pdserve.handoff import ExportDone, ImportDone, ImportOffered
from pdserve.protocol import Key

TOKENS_PER_BLOCK, NUM_BLOCKS, MANY = 4, 80, 64
WAIT_S = 30.0


def _pool() -> KvPoolView:
    group = GroupLayout(
        num_layers=2, kv_factor=2, num_kv_heads=1, tokens_per_block=TOKENS_PER_BLOCK, head_dim=4, dtype="float16"
    )
    blocks = pool_with_margins((NUM_BLOCKS, *group.block_shape), torch.float16).zero_()
    return KvPoolView((blocks,), KvLayout(model="bench", groups=(group,)))


class Pair:
    """A context and a generation worker's transceiver, whose messages hold one block."""

    def __init__(self, backend: str, direct: bool) -> None:
        config = CacheTransceiverConfig(backend=backend, max_tokens_in_buffer=4 * TOKENS_PER_BLOCK, direct_reads=direct)
        self._sent: queue.Queue[Any] = queue.Queue()
        self._received: queue.Queue[Any] = queue.Queue()
        sender, receiver = _pool(), _pool()
        options = TransceiverOptions("generation-0", "127.0.0.1")
        self._receiver = Transceiver(receiver, config, options, self._on_event, imports=Imports())
        options = TransceiverOptions("context-0", "127.0.0.1")
        self._sender = Transceiver(sender, config, options, self._sent.put, exports=Exports())
        self._exporter, self._importer = Exporter(self._sender), Importer(self._receiver)
        self._address = self._receiver.start()
        self._sender.start()
        self._count = 0

    def hand_over(self, num_blocks: int) -> float:
        """Seconds of processor time from the offer to both ends' last events."""
        key = Key(str(self._count), 0)
        self._count += 1
        num_tokens, blocks = num_blocks * TOKENS_PER_BLOCK, range(num_blocks)
        began_s = time.process_time()
        self._exporter.offer(key, self._address, num_tokens, (blocks,))
        self._exporter.finish(key, 1)
        assert isinstance(self._received.get(timeout=WAIT_S), ImportDone)
        assert isinstance(self._sent.get(timeout=WAIT_S), ExportDone)
        return time.process_time() - began_s

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()

    def _on_event(self, event: Any) -> None:
        if isinstance(event, ImportOffered):
            self._importer.accept(event.key, (range(event.num_tokens // TOKENS_PER_BLOCK),), 0)
        else:
            self._received.put(event)


def _median_us(run: Callable[[], float], repeats: int) -> float:
    for _ in range(repeats // 10 + 1):
        run()
    return statistics.median(run() for _ in range(repeats)) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="LOOPBACK", choices=("LOOPBACK", "UCX"))
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--repeats", type=int, default=300)
    chosen = parser.parse_args()
    warn_if_busy()
    pieces.READ_BYTES = _pool().groups[0].block_bytes
    pair = Pair(chosen.backend, chosen.direct)
    try:
        one = _median_us(lambda: pair.hand_over(1), chosen.repeats)
        many = _median_us(lambda: pair.hand_over(MANY), chosen.repeats)
    finally:
        pair.close()
    each = (many - one) / (MANY - 1)
    print(f"{chosen.backend}{', direct' if chosen.direct else ''}: {one:.0f} us a handoff of one piece, "
          f"{many:.0f} us of {MANY}, {each:.1f} us for each further one")  # fmt: skip
    told = {"backend": chosen.backend, "direct": chosen.direct, "one_us": one, "many_us": many, "each_us": each}
    print(json.dumps(told))


if __name__ == "__main__":
    main()

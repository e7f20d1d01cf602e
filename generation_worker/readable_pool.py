"""The pool of a sender that an import may read in place: mapped, found to be what the sender says, unmapped in time.

Life of a `ReadablePool`: `checked_pool` maps it and compares its margins → held by reads → closed with its connection,
and unmapped once nothing reads it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from kv_transfer.copies import BlockCopier
from kv_transfer.environment import Environment
from kv_transfer.layout import Span
from kv_transfer.peer_memory import PeerPool, distrust, map_pool
from kv_transfer.routes import Packing
from kv_transfer.wire import OpenLink
from pd_kernels.kv_pack import ForeignPool


class ReadablePool:
    """The sender's pool, mapped, whose blocks have `layers`; `reader` copies out of it. Unmapped once closed and held
    by nothing."""

    def __init__(self, mapped: PeerPool, layers: Span, copier: BlockCopier) -> None:
        self.num_blocks = mapped.num_blocks
        self.layers = layers
        self.reader = copier.reader(ForeignPool(mapped.address, mapped.num_blocks, layers.size))
        self.transport = mapped.transport
        self._mapped: PeerPool | None = mapped
        self._held = 0
        self._closed = False

    def hold(self) -> None:
        """Something reads it until `let_go`."""
        self._held += 1

    def let_go(self) -> None:
        self._held -= 1
        self._unmap_if_idle()

    def close(self) -> None:
        self._closed = True
        self._unmap_if_idle()

    def _unmap_if_idle(self) -> None:
        if self._closed and self._held == 0 and self._mapped is not None:
            self._mapped.close()
            self._mapped = None


def checked_pool(
    env: Environment, opening: OpenLink, packing: Packing, then: Callable[[ReadablePool | None], None]
) -> None:
    """Call `then` with the pool that `opening` names, now or soon; None if its blocks are not like ours, or it can't be
    read from here.

    Raises:
        TransferError: the sender claims a pool that it has not.
    """
    mapped, layers = None, opening.layout.layers
    if opening.pool is not None and packing.whole_blocks and env.config.direct_reads:
        layer_bytes = packing.cell_bytes * packing.unit_tokens
        mapped = map_pool(opening.pool, layers.size * layer_bytes, env.pool.tensor.device)
    if mapped is None:
        then(None)
        return
    found, mark = env.copier.read_margins(mapped.address, mapped.nbytes)
    env.poller.when(mark, partial(_compare, env, opening, mapped, found, then), soon=True)


def _compare(
    env: Environment,
    opening: OpenLink,
    mapped: PeerPool,
    found: Tensor,
    then: Callable[[ReadablePool | None], None],
    error: Exception | None,
) -> None:
    assert opening.pool is not None, "it is mapped"
    if error is None and found.numpy().tobytes() == opening.pool.margins:
        then(ReadablePool(mapped, opening.layout.layers, env.copier))
        return
    distrust(opening.pool, opening.worker_id)
    mapped.close()
    then(None)

"""The pool of a sender that imports read in place: mapped into this process, checked, and unmapped when it is done
with.

Life of a `ReadablePool`: `checked_pool` maps it and compares its margins → held by reads → closed with its link, and
unmapped once nothing reads it any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from kv_transfer.environment import Environment
from kv_transfer.layout import Span
from kv_transfer.mark_poller import Mark
from kv_transfer.peer_memory import PeerPool, PoolName, distrust, map_pool
from kv_transfer.routes import Terms
from kv_transfer.wire import OpenLink
from pd_kernels.kv_pack import BlockReader, ForeignPool
from pdserve.errors import TransferError


class ReadableGroup(NamedTuple):
    """A group's blocks at the sender, which have `layers` of it; `reader` copies out of them."""

    num_blocks: int
    layers: Span
    reader: BlockReader


class ReadablePool:
    """A sender's pool, mapped into this process. It is unmapped once it is closed and no read holds it.

    `groups` has, by number, the cache groups that the sender shares with this rank.
    """

    def __init__(self, env: Environment, mapped: dict[int, PeerPool], opening: OpenLink) -> None:
        self.groups: dict[int, ReadableGroup] = {}
        for number, pool in mapped.items():
            layers = opening.layout.groups[number].layers
            reader = env.copier.reader(ForeignPool(pool.address, pool.num_blocks, layers.size), number)
            self.groups[number] = ReadableGroup(pool.num_blocks, layers, reader)
        self._mapped = mapped
        self.transport = next(iter(mapped.values())).transport
        self._held = 0
        self._closed = False

    def hold(self) -> None:
        """A read begins: keep the pool mapped until `let_go`."""
        self._held += 1

    def let_go(self) -> None:
        self._held -= 1
        self._unmap_if_idle()

    def close(self) -> None:
        self._closed = True
        self._unmap_if_idle()

    def _unmap_if_idle(self) -> None:
        if self._closed and self._held == 0:
            _unmap(self._mapped)


def checked_pool(
    env: Environment, opening: OpenLink, terms: Terms, then: Callable[[ReadablePool | None], None]
) -> None:
    """Map and check the pool that `opening` names, and call `then` with it, now or soon.

    `then` gets None if the sender's blocks are not like ours, or its pool can't be read from this process.

    Raises:
        TransferError: the pool is not as the sender says.
    """
    mapped = _map(env, opening, terms) if opening.pools and terms.whole_blocks and env.config.direct_reads else {}
    if not mapped:
        then(None)
        return
    found: dict[int, Tensor] = {}
    mark: Mark = None
    for number, pool in mapped.items():  # one after the other on one stream: the last mark is that of all
        found[number], mark = env.copier.read_margins(pool.address, pool.nbytes)
    env.poller.when(mark, partial(_compare, env, opening, mapped, found, then), soon=True)


def _map(env: Environment, opening: OpenLink, terms: Terms) -> dict[int, PeerPool]:
    """The pools of all groups that are shared; none if one of them can't be mapped."""
    if len(opening.pools) != len(terms.packings):
        raise TransferError(f"{len(opening.pools)} pools are named for {len(terms.packings)} groups", "protocol")
    mapped: dict[int, PeerPool] = {}
    try:
        for number, packing in enumerate(terms.packings):
            if packing.share.pairs:
                layer_bytes = packing.cell_bytes * packing.unit_tokens
                pool = _map_one(env, opening.pools[number], opening.layout.groups[number].layers.size * layer_bytes)
                if pool is None:
                    _unmap(mapped)
                    break
                mapped[number] = pool
    except TransferError:
        _unmap(mapped)
        raise
    return mapped


def _map_one(env: Environment, name: PoolName | None, block_bytes: int) -> PeerPool | None:
    return None if name is None else map_pool(name, block_bytes, env.pool.device)


def _unmap(mapped: dict[int, PeerPool]) -> None:
    while mapped:
        mapped.popitem()[1].close()


def _compare(
    env: Environment,
    opening: OpenLink,
    mapped: dict[int, PeerPool],
    found: dict[int, Tensor],
    then: Callable[[ReadablePool | None], None],
    error: Exception | None,
) -> None:
    names = {number: name for number, name in enumerate(opening.pools) if number in mapped and name is not None}
    wrong = [name for number, name in names.items() if error or found[number].numpy().tobytes() != name.margins]
    if not wrong:
        then(ReadablePool(env, mapped, opening))
        return
    for name in wrong:
        distrust(name, opening.worker_id)
    _unmap(mapped)
    then(None)

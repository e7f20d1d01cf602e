"""The second pool, in host memory: which evicted prefix is kept in which of its blocks.

Owns the map from digest to host block and the order in which host blocks are given up; the memory is the runner's, and
the copies are made by whoever carries a step's `BlockCopy`s out, in their order. A host block keeps its content when it
is brought back to the device, so that the next eviction of the same prefix copies nothing.

A block counts as filled as soon as its copy is planned, because it can only be read by a later copy. If the copies of a
step may not have been made, the scheduler calls `forget` for what they should have written.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator


class HostCache:
    """Host blocks by the prefix they hold, least recently used first."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._block_by_digest: OrderedDict[bytes, int] = OrderedDict()
        self._digest_by_block: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._block_by_digest)

    def find(self, digest: bytes) -> int | None:
        return self._block_by_digest.get(digest)

    def touch(self, block_id: int) -> None:
        """`block_id` is in use: it is now the most recently used."""
        self._block_by_digest.move_to_end(self._digest_by_block[block_id])

    def store(self, digest: bytes, keep: Iterable[int] = ()) -> int | None:
        """A host block for `digest`, to be filled. None if it has one already, or none can be had.

        Args:
            keep: host blocks that must not be given up for it.
        """
        if digest in self._block_by_digest:
            self._block_by_digest.move_to_end(digest)
            return None
        block_id = self._free.pop() if self._free else self._evict(frozenset(keep))
        if block_id is not None:
            self._block_by_digest[digest] = block_id
            self._digest_by_block[block_id] = digest
        return block_id

    def forget(self, block_ids: Iterable[int]) -> None:
        """What these blocks hold can't be trusted."""
        for block_id in block_ids:
            digest = self._digest_by_block.pop(block_id, None)
            if digest is not None:
                del self._block_by_digest[digest]
                self._free.append(block_id)

    def checks(self, num_at_once: int) -> Iterator[bool]:
        """Whether both maps mirror each other and every block is in them or free, so many blocks at a time."""
        free = set(self._free)
        yield len(free) == len(self._free) and len(self._block_by_digest) == len(self._digest_by_block)
        for start in range(0, self.num_blocks, num_at_once):
            yield all(
                (block_id in free) != (self._block_by_digest.get(self._digest_by_block.get(block_id, b"")) == block_id)
                for block_id in range(start, min(start + num_at_once, self.num_blocks))
            )

    def _evict(self, keep: frozenset[int]) -> int | None:
        for digest, block_id in self._block_by_digest.items():
            if block_id not in keep:
                del self._block_by_digest[digest]
                del self._digest_by_block[block_id]
                return block_id
        return None

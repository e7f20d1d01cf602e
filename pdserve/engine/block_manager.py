"""The blocks of the KV pool: who holds which, and which may be taken.

Owns reference counts, the free list and the prefix cache; knows block numbers only, never tensors or sequences. A
block is in one of four states, and `counts` always adds up:

    free ──allocate──► used ──release──► free, or cached when its content is registered
    free ──allocate(reserved=True)──► reserved ──commit──► used      named in an accepted import, not yet filled
    cached ──allocate(shared=...)──► used, with its content; or evicted when the free list is empty

A block is registered for reuse only when its KV is really computed, so a match can be read at once. Several
sequences may hold one registered block; nobody writes to it, because only full blocks are registered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pdserve.engine.prefix_cache import BlockHashes, PrefixCache
from pdserve.protocol import BlockCounts


class BrokenInvariant(AssertionError):
    """The block tables contradict each other: a bug of ours, after which no KV can be trusted."""


class BlockManager:
    """Paged blocks with reference counts and prefix reuse."""

    def __init__(self, num_blocks: int, tokens_per_block: int, enable_block_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._reserved: set[int] = set()
        self._num_used = 0
        self._cache = PrefixCache()

    @property
    def available(self) -> int:
        """Blocks that an allocation may take: free and cached ones."""
        return len(self._free) + len(self._cache.idle_blocks)

    def counts(self) -> BlockCounts:
        return BlockCounts(
            total=self.num_blocks,
            free=len(self._free),
            cached=len(self._cache.idle_blocks),
            used=self._num_used,
            reserved=len(self._reserved),
        )

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def match_prefix(self, hashes: BlockHashes, max_blocks: int) -> list[int]:
        """The longest chain of registered blocks, at most `max_blocks`, that `hashes` starts with. Takes nothing."""
        matched: list[int] = []
        if not self.enable_block_reuse:
            return matched
        for index in range(max_blocks):
            block_id = self._cache.find(hashes.digest(index))
            if block_id is None:
                break
            matched.append(block_id)
        return matched

    def allocate(
        self, num_blocks: int, *, shared: Sequence[int] = (), headroom: int = 0, reserved: bool = False
    ) -> list[int] | None:
        """A table of `shared` followed by `num_blocks` fresh blocks, or None if there are not enough.

        Args:
            shared: blocks just returned by `match_prefix`.
            headroom: blocks that must still be available afterwards.
            reserved: the fresh blocks are to be filled by an import; `commit` makes them used.
        """
        idle = self._cache.idle_blocks
        if self.available - sum(block_id in idle for block_id in shared) < num_blocks + headroom:
            return None
        for block_id in shared:
            if self._users[block_id] == 0:
                self._cache.mark_used(block_id)
                self._num_used += 1
            self._users[block_id] += 1
        fresh = [self._take() for _ in range(num_blocks)]
        if reserved:
            self._reserved.update(fresh)
        else:
            self._num_used += num_blocks
        return [*shared, *fresh]

    def extend(self, block_ids: list[int]) -> bool:
        """Append one fresh block to a sequence's table; False if none is available."""
        if not self._free and not self._cache.idle_blocks:
            return False
        block_ids.append(self._take())
        self._num_used += 1
        return True

    def commit(self, block_ids: Iterable[int]) -> None:
        """An import has filled `block_ids`: those that were reserved are used from now on."""
        for block_id in block_ids:
            if block_id in self._reserved:
                self._reserved.remove(block_id)
                self._num_used += 1

    def register(self, hashes: BlockHashes, block_ids: Sequence[int], first: int, end: int) -> None:
        """Offer blocks `first` to `end` - 1 of a table for reuse. They must be full and their KV computed."""
        if self.enable_block_reuse:
            for index in range(first, end):
                self._cache.add(block_ids[index], hashes.digest(index))

    def release(self, block_ids: Sequence[int]) -> None:
        """Give a whole table back. A shared block stays with its other users."""
        # Tail first: a prefix's later blocks are useless without the earlier ones, so they must be evicted first.
        for block_id in reversed(block_ids):
            users = self._users[block_id] - 1
            if users < 0:
                raise BrokenInvariant(f"block {block_id} was released by more sequences than held it")
            self._users[block_id] = users
            if users:
                continue
            if block_id in self._reserved:
                self._reserved.remove(block_id)
            else:
                self._num_used -= 1
            if block_id in self._cache:
                self._cache.mark_idle(block_id)
            else:
                self._free.append(block_id)

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Recompute every count from `tables`, all tables that sequences hold.

        Raises:
            BrokenInvariant: saying which of the books is wrong.
        """
        users = Counter(block_id for table in tables for block_id in table)
        counts, free, idle = self.counts(), set(self._free), set(self._cache.idle_blocks)
        held = {block_id for block_id, count in enumerate(self._users) if count}
        problems = {
            "a block's users are not the tables that name it": users != +Counter(dict(enumerate(self._users))),
            "the four states don't add up to the pool": (
                counts.free + counts.cached + counts.used + counts.reserved != counts.total
            ),
            "a block is listed as free twice": len(free) != len(self._free),
            "a block is in two states": bool(free & idle or free & held or idle & held),
            "a reserved block has no holder": not self._reserved <= held,
            "the number of used blocks is wrong": counts.used != len(held - self._reserved),
            "a free or reserved block is registered": any(block in self._cache for block in free | self._reserved),
            "the prefix cache's maps differ": not self._cache.is_consistent(),
        }
        broken = [problem for problem, found in problems.items() if found]
        if broken:
            raise BrokenInvariant(f"{'; '.join(broken)} ({counts})")

    def _take(self) -> int:
        block_id = self._free.pop() if self._free else self._cache.evict()
        self._users[block_id] = 1
        return block_id

"""The blocks of one cache group's pool: who holds which, and which may be taken.

Owns reference counts, the free list, the prefix cache and the books of the host's blocks; knows block numbers only,
never tensors or sequences. `KvCache` has one for each group. A block is in one of four states, and `counts` always adds
up:

    free ──allocate──► used ──release──► free, or cached when its content is registered
    free ──allocate(reserved=True)──► reserved ──commit──► used      named in an accepted import, not yet filled
    cached ──allocate(match)──► used, with its content; or evicted when the free list is empty

A block is registered for reuse when its KV is computed, or as *pending* when the step that computes it is launched:
steps that are launched later may read it. `settle` ends that when the step has succeeded, `void` when it has failed:
then the block holds nothing, whoever has it. Several sequences may hold one registered block; nobody writes to it,
because a block that is not full is registered only when its last user leaves. Blocks that `fork` shares may be written
to: `own` gives the writer one of its own first.

Some decisions must be carried out on the device: content that moves to the host when it is evicted, comes back when it
is matched, or is copied because only part of it matches. They wait in order in `take_copies`, and hold if each is made
before the next step and after what was launched before. Another stream (a transceiver's) may write to a block that was
just allocated only when these copies are known to have been made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.host_offload import HostCache
from pdserve.engine.schedule.prefix_cache import NO_BLOCK, NOTHING, BlockHashes, Match, PrefixCache
from pdserve.protocol import BlockCounts

_CHECKED_AT_ONCE = 1024
"""Blocks, or entries of a map: half a millisecond."""


class BrokenInvariant(AssertionError):
    """The block tables contradict each other: a bug of ours, after which no KV can be trusted."""


class BlockManager:
    """Paged blocks with reference counts and prefix reuse.

    Args:
        enable_partial_reuse: use what the block after the last whole match has in common with the prompt.
        copy_on_partial_reuse: by copying it. Without, a block that nobody uses is taken over, and loses the rest.
        num_host_blocks: where evicted blocks are kept.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        enable_block_reuse: bool = True,
        *,
        enable_partial_reuse: bool = True,
        copy_on_partial_reuse: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self.host = HostCache(num_host_blocks)
        self.num_offloaded = self.num_onboarded = self.num_partial_matches = 0
        self._partial_reuse = enable_block_reuse and enable_partial_reuse
        self._copy_partial = copy_on_partial_reuse
        self._free = list(range(num_blocks - 1, -1, -1))
        self._users = [0] * num_blocks
        self._reserved: set[int] = set()
        self._pending: set[int] = set()
        self._num_used = 0
        self._cache = PrefixCache()
        self._copies: list[BlockCopy] = []

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

    def find(self, digest: bytes) -> int:
        """The block on the device that has this name, or `NO_BLOCK`."""
        block_id = self._cache.find(digest) if self.enable_block_reuse else None
        return NO_BLOCK if block_id is None else block_id

    def is_pending(self, block_id: int) -> bool:
        """Whether the step that computes this block was launched and is not collected yet."""
        return block_id in self._pending

    def num_proven(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks come before the first pending one."""
        if self._pending.isdisjoint(block_ids):
            return len(block_ids)
        return next(at for at, block_id in enumerate(block_ids) if block_id in self._pending)

    def is_present(self, block_id: int) -> bool:
        """Whether this block is offered for reuse: its KV is computed, or the step that computes it is launched."""
        return block_id in self._cache

    def match(self, hashes: BlockHashes, num_tokens: int, only_whole_blocks: bool = False) -> Match:
        """Find the longest prefix of the first `num_tokens` tokens that is present. Takes no block."""
        if not self.enable_block_reuse:
            return NOTHING
        shared: list[int] = []
        on_host: list[int] = []
        end = num_tokens // self.tokens_per_block
        for chain, find in ((shared, self._cache.find), (on_host, self.host.find)):
            for index in range(len(shared), end):
                block_id = find(hashes.digest(index))
                if block_id is None:
                    break
                chain.append(block_id)
        match = Match(tuple(shared), tuple(on_host))
        if only_whole_blocks or not self._partial_reuse:
            return match
        # A block that matches as a whole, but lies behind `num_tokens`, can be reused in part: its last token must be
        # computed.
        index = match.num_blocks
        tokens = hashes.tokens(index, min(self.tokens_per_block, num_tokens - index * self.tokens_per_block))
        partial, length = self._cache.find_partial(hashes.parent(index), tokens, not self._copy_partial)
        return replace(match, partial=partial, num_partial_tokens=length)

    def allocate(
        self, num_blocks: int, match: Match = NOTHING, *, headroom: int = 0, reserved: bool = False
    ) -> list[int] | None:
        """A table of `num_blocks` blocks that begins with what `match` found, or None if there are not enough.

        Args:
            match: what `match` has just returned. After None for one with part of a block, the caller may try
                `match.whole_blocks()`, which needs fewer blocks.
            headroom: blocks that must still be available afterwards.
            reserved: the rest of the table is to be filled by an import; `commit` makes it used.
        """
        if not self.fits(num_blocks, match, headroom):
            return None
        for block_id in match.shared:
            self._hold(block_id)
        partial = self._claim_partial(match)
        table = [*match.shared, *self._bring_back(match.host), *partial]
        self._num_used += len(table) - len(match.shared)
        fresh = [self._take() for _ in range(num_blocks - match.num_absent - len(table))]
        if reserved:
            self._reserved.update(fresh)
        else:
            self._num_used += len(fresh)
        return [NO_BLOCK] * match.num_absent + table + fresh

    def fits(self, num_blocks: int, match: Match, headroom: int) -> bool:
        """Whether `allocate` finds enough blocks."""
        idle, num_fresh = self._cache.idle_blocks, num_blocks - match.num_absent - len(match.shared)
        num_left = self.available - sum(each in idle for each in match.shared) - num_fresh
        copied = match.num_partial_tokens > 0 and self._copy_partial
        return num_left >= max(headroom, copied and match.partial in idle)

    def extend(self, block_ids: list[int]) -> bool:
        """Append one fresh block to a sequence's table; False if none is available."""
        if not self._free and not self._cache.idle_blocks:
            return False
        block_ids.append(self._take())
        self._num_used += 1
        return True

    def take_copies(self) -> list[BlockCopy]:
        """What must be copied before the next step, in this order. They are given out once."""
        copies, self._copies = self._copies, []
        return copies

    def commit(self, block_ids: Iterable[int]) -> None:
        """An import has filled `block_ids`: those that were reserved are used from now on."""
        for block_id in block_ids:
            if block_id in self._reserved:
                self._reserved.remove(block_id)
                self._num_used += 1

    def register(
        self, hashes: BlockHashes, block_ids: Sequence[int], first: int, end: int, pending: bool = False
    ) -> None:
        """Offer blocks `first` to `end` - 1 of a table for reuse. They must be full.

        Args:
            pending: the step that computes their KV is launched; `settle` or `void` follows.
        """
        if not self.enable_block_reuse:
            return
        for index in range(first, end):
            block_id = block_ids[index]
            is_new = block_id >= 0 and self._cache.add(block_id, hashes, index, self.tokens_per_block, True)
            if is_new and pending:
                self._pending.add(block_id)

    def settle(self, block_ids: Iterable[int]) -> None:
        """The step that computes these blocks has succeeded."""
        self._pending.difference_update(block_ids)

    def void(self, block_ids: Iterable[int]) -> None:
        """The step that should have computed these blocks has failed: those that are pending are no longer offered."""
        for block_id in self._pending.intersection(block_ids):
            self._pending.remove(block_id)
            self._cache.forget(block_id)

    def register_tail(self, hashes: BlockHashes, block_ids: Sequence[int], num_tokens: int) -> None:
        """Offer the block that holds the last of `num_tokens` computed tokens for partial reuse, if it isn't full.

        A user must be about to release it. If there are others, they may still write to it, and it is not offered.
        """
        index, length = divmod(num_tokens, self.tokens_per_block)
        if not length or not self._partial_reuse or self._users[block_ids[index]] > 1:
            return
        _, known = self._cache.find_partial(hashes.parent(index), hashes.tokens(index, length), False)
        if known < length:
            self._cache.add(block_ids[index], hashes, index, length, False)

    def release(self, block_ids: Sequence[int]) -> None:
        """Give a whole table back. A shared block stays with its other users."""
        # Tail first: a prefix's later blocks are useless without the earlier ones, so they must be evicted first.
        for block_id in reversed(block_ids):
            if block_id >= 0:
                self._let_go(block_id)

    def fork(self, block_ids: Iterable[int]) -> None:
        """These blocks have one more holder each, which writes to none of them without `own`."""
        for block_id in block_ids:
            if block_id >= 0:
                self._hold(block_id)

    def own(self, block_id: int) -> int | None:
        """A block with the content of `block_id` for one of its holders alone: itself, or a copy, in exchange.

        None if there is no block for the copy.
        """
        if self._users[block_id] == 1:
            return block_id
        if not self.available:
            return None
        copy = self._take()
        self._num_used += 1
        self._copies.append(BlockCopy("duplicate", block_id, copy))
        self._let_go(block_id)
        return copy

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """All of `checks` at once."""
        for _ in self.checks(tables):
            pass

    def checks(self, tables: Iterable[Sequence[int]]) -> Iterator[None]:
        """Recompute every count from `tables`, all tables that sequences hold, some blocks at a time.

        Nothing may change between two of the slices.

        Raises:
            BrokenInvariant: with the last slice, saying which of the books is wrong.
        """
        users = dict(Counter(block_id for table in tables for block_id in table if block_id != NO_BLOCK))
        counts, free = self.counts(), set(self._free)
        problems: dict[str, bool] = {}
        num_used = 0
        for start in range(0, self.num_blocks, _CHECKED_AT_ONCE):
            for block_id in range(start, min(start + _CHECKED_AT_ONCE, self.num_blocks)):
                num_users, is_reserved = self._users[block_id], block_id in self._reserved
                is_free, is_idle, is_held = block_id in free, block_id in self._cache.idle_blocks, num_users > 0
                num_used += is_held and not is_reserved
                if num_users != users.get(block_id, 0):
                    problems["a block's users are not the tables that name it"] = True
                if is_free + is_idle + is_held != 1:
                    problems["a block is not in one state"] = True
                if is_reserved and not is_held:
                    problems["a reserved block has no holder"] = True
                if (is_free or is_reserved) and block_id in self._cache:
                    problems["a free or reserved block is registered"] = True
            yield
        problems |= {
            "a table names a block that is not there": any(not 0 <= block < self.num_blocks for block in users),
            "the four states don't add up to the pool": (
                counts.free + counts.cached + counts.used + counts.reserved != counts.total
            ),
            "a block is listed as free twice": len(free) != len(self._free),
            "the number of used blocks is wrong": counts.used != num_used,
            "a pending block is not registered, or nobody holds it": any(
                not self._users[block_id] or block_id not in self._cache for block_id in self._pending
            ),
        }
        for name, cache in (("prefix", self._cache), ("host", self.host)):
            for is_consistent in cache.checks(_CHECKED_AT_ONCE):
                if not is_consistent:
                    problems[f"the {name} cache's maps differ"] = True
                yield
        broken = [problem for problem, found in problems.items() if found]
        if broken:
            raise BrokenInvariant(f"{'; '.join(broken)} ({counts})")

    def _hold(self, block_id: int) -> None:
        if self._users[block_id] == 0:
            self._cache.mark_used(block_id)
            self._num_used += 1
        self._users[block_id] += 1

    def _let_go(self, block_id: int) -> None:
        users = self._users[block_id] - 1
        if users < 0:
            raise BrokenInvariant(f"block {block_id} was released by more sequences than held it")
        self._users[block_id] = users
        if users:
            return
        if block_id in self._reserved:
            self._reserved.remove(block_id)
        else:
            self._num_used -= 1
        if block_id in self._cache:
            self._cache.mark_idle(block_id)
        else:
            self._free.append(block_id)

    def _claim_partial(self, match: Match) -> list[int]:
        """A block with the content of `match.partial`, if that has any: a copy, or itself."""
        if not match.num_partial_tokens:
            return []
        self.num_partial_matches += 1
        if not self._copy_partial:
            return [self._give_up(match.partial, match.host)]
        self._hold(match.partial)
        block_id = self._take(match.host)
        self._copies.append(BlockCopy("duplicate", match.partial, block_id))
        self._let_go(match.partial)
        return [block_id]

    def _bring_back(self, host_blocks: Sequence[int]) -> list[int]:
        """A block for each of the host's, to be filled from it."""
        targets = [self._take(host_blocks) for _ in host_blocks]
        for source, target in zip(host_blocks, targets, strict=True):
            self.host.touch(source)
            self._copies.append(BlockCopy("onboard", source, target))
        self.num_onboarded += len(targets)
        return targets

    def _take(self, keep: Iterable[int] = ()) -> int:
        """A free block, or the oldest idle one. `keep` are blocks of the host that must not be given up for it."""
        if not self._free:
            return self._give_up(self._cache.oldest_idle(), keep)
        block_id = self._free.pop()
        self._users[block_id] = 1
        return block_id

    def _give_up(self, block_id: int, keep: Iterable[int] = ()) -> int:
        """Take an idle block, whose content goes to the host if it is a whole block's."""
        digest = self._cache.forget(block_id)
        if digest is not None:
            target = self.host.store(digest, keep)
            if target is not None:
                self._copies.append(BlockCopy("offload", block_id, target))
                self.num_offloaded += 1
        self._users[block_id] = 1
        return block_id

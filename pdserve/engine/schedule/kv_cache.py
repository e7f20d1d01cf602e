"""All cache groups of one engine: what a sequence gets, it gets in every group or in none.

Owns one `BlockManager` a group, and which blocks of a window group a sequence still needs. Knows no sequences: it is
called with their tables, one a group. All tables of a sequence have the same length, block `i` of each holds the same
tokens, and `NO_BLOCK` stands where a window group needs no block any more.

A prompt takes blocks for all of its tokens in every group. Those before the window are given back as it is computed, so
each group must have blocks for the longest sequence, once. Part of a block is reused, and blocks are kept in host
memory, only where the one group has no window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from pdserve.engine.schedule.batch import BlockCopy
from pdserve.engine.schedule.block_manager import BlockManager
from pdserve.engine.schedule.options import EngineOptions
from pdserve.engine.schedule.prefix_cache import NO_BLOCK, BlockHashes, Match
from pdserve.errors import ConfigError
from pdserve.protocol import BlockCounts, EngineLimits

Tables = list[list[int]]


@dataclass(frozen=True, slots=True)
class Present:
    """What is present of a prompt: `matches` has an entry for each group.

    The first `num_shared_blocks` blocks stand on the device, those up to `num_blocks` on the host, and then there are
    `num_partial_tokens` tokens more to copy. The first `num_proven_blocks` depend on no step in flight.
    """

    matches: tuple[Match, ...]
    num_blocks: int = 0
    num_shared_blocks: int = 0
    num_proven_blocks: int = 0
    num_partial_tokens: int = 0

    @property
    def is_copied(self) -> bool:
        """Whether copies bring some of it."""
        return self.num_partial_tokens > 0 or self.num_blocks > self.num_shared_blocks

    def whole_blocks(self) -> Present:
        """The same without what must be copied from part of a block."""
        matches = tuple(replace(match, num_partial_tokens=0) for match in self.matches)
        return replace(self, matches=matches, num_partial_tokens=0)


class KvCache:
    """The groups of `limits`. `num_host_blocks` is the runner's.

    Raises:
        ConfigError: there are host blocks, and several groups or a window.
    """

    def __init__(self, limits: EngineLimits, options: EngineOptions, num_host_blocks: int = 0) -> None:
        self.tokens_per_block = limits.tokens_per_block
        self.num_blocks = min(group.num_blocks for group in limits.cache_groups)
        self._windows = tuple(
            group.window if group.window is not None and group.window < limits.max_seq_len else None
            for group in limits.cache_groups
        )
        self.enable_block_reuse = options.enable_block_reuse
        self.has_windows = any(self._windows)
        self._is_plain = self._windows == (None,)
        if num_host_blocks and not self._is_plain:
            raise ConfigError(
                "kv_cache_config.host_cache_size: blocks are kept in host memory only for models whose layers all "
                "attend over the whole sequence; allowed here: none",
                "kv_cache_config.host_cache_size",
            )
        self.groups = tuple(
            BlockManager(
                group.num_blocks,
                limits.tokens_per_block,
                options.enable_block_reuse,
                enable_partial_reuse=options.enable_partial_reuse and self._is_plain,
                copy_on_partial_reuse=options.copy_on_partial_reuse,
                num_host_blocks=num_host_blocks,
            )
            for group in limits.cache_groups
        )

    @property
    def available(self) -> int:
        """Blocks that an allocation may take in every group: free and cached ones."""
        return min(group.available for group in self.groups)

    @property
    def num_free(self) -> int:
        """Blocks that an allocation may take in every group without an end to any cached prefix."""
        return min(group.counts().free for group in self.groups)

    def counts(self) -> BlockCounts:
        """Blocks of all groups by state."""
        counts = [msgspec.structs.astuple(group.counts()) for group in self.groups]
        return BlockCounts(*map(sum, zip(*counts, strict=True)))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of a group that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def nothing(self, num_imported_tokens: int = 0) -> Present:
        """Nothing is present; see `match`."""
        return Present(tuple(Match(num_absent=self._first(each, num_imported_tokens)) for each in self._windows))

    def match(self, hashes: BlockHashes, num_tokens: int, num_imported_tokens: int = 0) -> Present:
        """The longest part of the first `num_tokens` tokens that is present in every group. Takes nothing.

        A window group needs only the blocks of the window before the first token that may be computed. With pending
        blocks that is the first of theirs: if their step fails, they are computed again.

        Args:
            num_imported_tokens: an import is to bring the KV of so many tokens, and nothing before them is computed: a
                window group needs only the blocks of the window before their end. Only whole blocks that depend on no
                step in flight are taken then.
        """
        if not self.enable_block_reuse:
            return self.nothing(num_imported_tokens)
        if self._is_plain:
            return self._match_plain(hashes, num_tokens, imports=num_imported_tokens > 0)
        return self._match_groups(hashes, num_tokens // self.tokens_per_block, num_imported_tokens)

    def allocate(
        self, num_blocks: int, present: Present, *, headroom: int = 0, reserved: bool = False
    ) -> Tables | None:
        """Tables of `num_blocks` entries that begin with what `match` found; None if a group has not enough blocks.

        Args:
            present: what `match` has just returned. If it has part of a block, there may be enough without that.
            headroom: blocks that must still be available afterwards, in each group.
            reserved: the rest of the tables is to be filled by an import; `commit` makes it used.
        """
        each = list(zip(self.groups, present.matches, strict=True))
        if not all(group.fits(num_blocks, match, headroom) for group, match in each):
            return None
        tables = [group.allocate(num_blocks, match, headroom=headroom, reserved=reserved) for group, match in each]
        return [table for table in tables if table is not None]

    def extend(self, tables: Tables) -> bool:
        """Append a fresh block to each of a sequence's tables; False if a group has none."""
        for group in self.groups:
            if not group.available:
                return False
        for group, table in zip(self.groups, tables, strict=True):
            group.extend(table)
        return True

    def slide(self, tables: Tables, num_tokens: int) -> None:
        """Give back what no step needs any more that begins in the block of token `num_tokens` or after it."""
        block_start = num_tokens - num_tokens % self.tokens_per_block
        for group, window, table in zip(self.groups, self._windows, tables, strict=True):
            end = self._first(window, block_start)
            start = end
            while start and table[start - 1] != NO_BLOCK:
                start -= 1
            if start < end:
                group.release(table[start:end])
                table[start:end] = [NO_BLOCK] * (end - start)

    def can_compute_from(self, tables: Tables, num_tokens: int) -> bool:
        """Whether no block is missing that is needed to compute token `num_tokens` and those after it."""
        end = num_tokens // self.tokens_per_block
        firsts = [self._first(window, num_tokens) for window in self._windows]
        return not any(NO_BLOCK in table[first:end] for first, table in zip(firsts, tables, strict=True))

    def moved(self, tables: Tables, num_tokens: int) -> Tables:
        """What a handoff of `num_tokens` tokens moves: of a window group only the window before their end."""
        firsts = [self._first(window, num_tokens) for window in self._windows]
        return [[NO_BLOCK] * first + table[first:] for first, table in zip(firsts, tables, strict=True)]

    def fork(self, tables: Tables, num_tokens: int) -> Tables:
        """Tables of a sequence with the same first `num_tokens` tokens. Who writes to a block calls `own` first."""
        shared = [table[: self.blocks_for(num_tokens)] for table in tables]
        for group, table in zip(self.groups, shared, strict=True):
            group.fork(table)
        return shared

    def own(self, tables: Tables, index: int) -> bool:
        """Make block `index` of each table its holder's alone, by a copy if somebody else holds it; False if a group
        has no block for that. A table that changes is a new list: who has sent it to a device sees that."""
        for at, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            block_id = group.own(table[index])
            if block_id is None:
                return False
            if block_id != table[index]:
                tables[at] = [*table[:index], block_id, *table[index + 1 :]]
        return True

    def take_copies(self) -> list[BlockCopy]:
        """What must be copied before the next step, in this order. They are given out once."""
        copies = self.groups[0].take_copies()
        for at, group in enumerate(self.groups[1:], 1):
            copies += [replace(copy, group=at) for copy in group.take_copies()]
        return copies

    def commit(self, tables: Tables) -> None:
        """An import has filled `tables`: blocks that were reserved are used from now on."""
        for group, table in zip(self.groups, tables, strict=True):
            group.commit(table)

    def register(self, hashes: BlockHashes, tables: Tables, first: int, end: int, pending: bool = False) -> None:
        """Offer blocks `first` to `end` - 1 of a sequence for reuse; see `BlockManager.register`."""
        for group, table in zip(self.groups, tables, strict=True):
            group.register(hashes, table, first, end, pending)

    def register_tail(self, hashes: BlockHashes, tables: Tables, num_tokens: int) -> None:
        """Offer the block that holds the last of `num_tokens` computed tokens for partial reuse, if it isn't full."""
        if self._is_plain:
            self.groups[0].register_tail(hashes, tables[0], num_tokens)

    def settle(self, tables: Tables, num_tokens: int) -> None:
        """All steps that compute the first `num_tokens` tokens of a sequence have succeeded."""
        for group, table in zip(self.groups, tables, strict=True):
            group.settle(table[: num_tokens // self.tokens_per_block])

    def void(self, tables: Tables, num_tokens: int) -> None:
        """One of them has failed: those blocks that are pending by now hold nothing, whoever has them."""
        for group, table in zip(self.groups, tables, strict=True):
            group.void(table[: num_tokens // self.tokens_per_block])

    def num_present(self, tables: Tables, first: int, end: int) -> int:
        """How many of a sequence's blocks from `first` on, before `end`, are offered for reuse: later steps may read
        them."""
        each = list(zip(self.groups, tables, strict=True))
        for index in range(first, end):
            if not all(table[index] == NO_BLOCK or group.is_present(table[index]) for group, table in each):
                return index - first
        return max(0, end - first)

    def release(self, tables: Tables) -> None:
        """Give all blocks of a sequence back. A shared block stays with its other users."""
        for group, table in zip(self.groups, tables, strict=True):
            group.release(table)

    def checks(self, tables: Sequence[Tables]) -> Iterator[None]:
        """Recompute every count from `tables`, those of all sequences; see `BlockManager.checks`."""
        for at, group in enumerate(self.groups):
            yield from group.checks([each[at] for each in tables])

    def _first(self, window: int | None, num_tokens: int) -> int:
        """The first block that is needed to compute token `num_tokens` and those after it."""
        return 0 if window is None else max(0, num_tokens - window + 1) // self.tokens_per_block

    def _match_plain(self, hashes: BlockHashes, num_tokens: int, imports: bool) -> Present:
        group = self.groups[0]
        match = group.match(hashes, num_tokens, only_whole_blocks=imports)
        num_proven = group.num_proven(match.shared)
        if imports and num_proven < len(match.shared):
            match = Match(match.shared[:num_proven])
        if match.num_partial_tokens and group.is_pending(match.partial):
            # To compute a few tokens more costs less than a copy that a failed step takes along.
            match = match.whole_blocks()
        return Present((match,), match.num_blocks, len(match.shared), num_proven, match.num_partial_tokens)

    def _match_groups(self, hashes: BlockHashes, end: int, num_imported_tokens: int) -> Present:
        found = [[group.find(hashes.digest(index)) for index in range(end)] for group in self.groups]
        num_proven = min(group.num_proven(ids) for group, ids in zip(self.groups, found, strict=True))
        if num_imported_tokens:
            end = num_proven
        # Blocks that one step computes in all groups, or that none does: else a block that is computed again may be
        # one that somebody reads.
        for group, ids in zip(self.groups, found, strict=True):
            ids[num_proven:end] = [each if group.is_pending(each) else NO_BLOCK for each in ids[num_proven:end]]
        num_blocks = self._longest(found, end, num_proven, num_imported_tokens)
        num_proven = min(num_proven, num_blocks)
        first_tokens = num_imported_tokens or num_proven * self.tokens_per_block
        firsts = [self._first(window, first_tokens) for window in self._windows]
        matches = tuple(
            Match(tuple(ids[first:num_blocks]), num_absent=first) for first, ids in zip(firsts, found, strict=True)
        )
        return Present(matches, num_blocks, num_blocks, num_proven)

    def _longest(self, found: list[list[int]], end: int, num_proven: int, num_imported_tokens: int) -> int:
        """The most blocks, at most `end`, of which each group has found those that it needs."""
        num_blocks = end
        settled = False
        while not settled:
            settled = True
            for window, ids in zip(self._windows, found, strict=True):
                first_tokens = num_imported_tokens or min(num_blocks, num_proven) * self.tokens_per_block
                needed = range(self._first(window, first_tokens), num_blocks)
                missing = next((index for index in reversed(needed) if ids[index] == NO_BLOCK), None)
                if missing is not None:
                    num_blocks, settled = missing, False
        return num_blocks

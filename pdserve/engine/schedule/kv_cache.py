"""All cache groups of one engine: a sequence gets blocks in every group, or in none.

The scheduler and `Capacity` call it, with a sequence's tables, one a group; it knows no sequences. Owns one
`BlockManager` a group, and the rule which blocks of a window group are still needed. All tables of a sequence have the
same length, and entry i of each names the block of the same tokens. `NO_BLOCK` stands where a window group needs no
block any more.

A prompt takes blocks for all of its tokens in every group. A window group gives back the blocks before its window as
the prompt is computed. So each group must have blocks for at least one sequence of the greatest length.

Two abilities exist only if there is one group and it has no window: part of a block is reused, and blocks are kept in
host memory.
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
    """The part of a prompt whose KV is in the cache.

    Attributes:
        matches: one entry a group.
        num_blocks: whole blocks, from the first token on, that are present in every group.
        num_shared_blocks: those of them that are on the device; the others are in host memory.
        num_proven_blocks: those that no step in flight is still to compute.
        num_partial_tokens: tokens after `num_blocks` that stand in part of a block, and can be copied from it.
    """

    matches: tuple[Match, ...]
    num_blocks: int = 0
    num_shared_blocks: int = 0
    num_proven_blocks: int = 0
    num_partial_tokens: int = 0

    @property
    def is_copied(self) -> bool:
        """Whether part of it must be copied before it can be used."""
        return self.num_partial_tokens > 0 or self.num_blocks > self.num_shared_blocks

    def whole_blocks(self) -> Present:
        """The same without `num_partial_tokens`."""
        matches = tuple(replace(match, num_partial_tokens=0) for match in self.matches)
        return replace(self, matches=matches, num_partial_tokens=0)


class KvCache:
    """See the module.

    Args:
        limits: the runner's; its `cache_groups` are the groups.
        num_host_blocks: blocks that the runner has in host memory.

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
        """Blocks that an allocation may take in every group without evicting a cached block."""
        return min(group.counts().free for group in self.groups)

    def counts(self) -> BlockCounts:
        """Blocks of all groups by state."""
        counts = [msgspec.structs.astuple(group.counts()) for group in self.groups]
        return BlockCounts(*map(sum, zip(*counts, strict=True)))

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks of a group that hold the KV of `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    def nothing(self, num_imported_tokens: int = 0) -> Present:
        """A `Present` of nothing, for `allocate`; `num_imported_tokens` as in `match`."""
        return Present(tuple(Match(num_absent=self._first(each, num_imported_tokens)) for each in self._windows))

    def match(self, hashes: BlockHashes, num_tokens: int, num_imported_tokens: int = 0) -> Present:
        """Find the longest prefix of the first `num_tokens` tokens that is present in every group. Takes no block.

        A full group needs every block of the prefix, a window group only those in the window of the first token that
        may be computed. That is the token after the prefix; or, if blocks of it are pending, the first token of those:
        they are computed again if their step fails.

        Args:
            num_imported_tokens: 0, or the length of an import. An import computes nothing of its own: a window group
                needs only the window before its end, and only whole blocks that no step in flight computes are used.
        """
        if not self.enable_block_reuse:
            return self.nothing(num_imported_tokens)
        if self._is_plain:
            return self._match_plain(hashes, num_tokens, imports=num_imported_tokens > 0)
        return self._match_groups(hashes, num_tokens // self.tokens_per_block, num_imported_tokens)

    def allocate(
        self, num_blocks: int, present: Present, *, headroom: int = 0, reserved: bool = False
    ) -> Tables | None:
        """Take blocks: tables of `num_blocks` entries that begin with `present`; None if a group has too few.

        Args:
            present: what `match` or `nothing` has just returned. After None for one with `num_partial_tokens`, the
                caller may try `present.whole_blocks()`, which needs fewer blocks.
            headroom: blocks that must be available afterwards, in each group.
            reserved: an import is to fill the rest of the tables. They count as reserved until `commit`.
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
        """Give back the blocks before the window of every token from the block of token `num_tokens` on."""
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
        """The tables of a handoff of `num_tokens` tokens: of a window group only the window before their end."""
        firsts = [self._first(window, num_tokens) for window in self._windows]
        return [[NO_BLOCK] * first + table[first:] for first, table in zip(firsts, tables, strict=True)]

    def fork(self, tables: Tables, num_tokens: int) -> Tables:
        """Tables for a second sequence with the same first `num_tokens` tokens, over the same blocks. Before either
        sequence writes to one of them, the caller calls `own`."""
        shared = [table[: self.blocks_for(num_tokens)] for table in tables]
        for group, table in zip(self.groups, shared, strict=True):
            group.fork(table)
        return shared

    def own(self, tables: Tables, index: int) -> bool:
        """Make block `index` of each table this sequence's alone, by a copy where another sequence holds it, too.

        Returns False if a group has no block for the copy. A changed table is a new list object, so that whoever has
        sent the old one to a device can tell.
        """
        for at, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            block_id = group.own(table[index])
            if block_id is None:
                return False
            if block_id != table[index]:
                tables[at] = [*table[:index], block_id, *table[index + 1 :]]
        return True

    def take_copies(self) -> list[BlockCopy]:
        """The block copies to make before the next step, in order. Each is returned once."""
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
        """A step that should have computed blocks of the first `num_tokens` tokens has failed: those that are pending
        hold nothing, and are no longer offered for reuse."""
        for group, table in zip(self.groups, tables, strict=True):
            group.void(table[: num_tokens // self.tokens_per_block])

    def num_present(self, tables: Tables, first: int, end: int) -> int:
        """How many blocks in a row, from entry `first` to before `end`, are offered for reuse, so that later steps may
        read them."""
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
        """The first entry of a group's table that is needed to compute token `num_tokens` and those after it."""
        return 0 if window is None else max(0, num_tokens - window + 1) // self.tokens_per_block

    def _match_plain(self, hashes: BlockHashes, num_tokens: int, imports: bool) -> Present:
        group = self.groups[0]
        match = group.match(hashes, num_tokens, only_whole_blocks=imports)
        num_proven = group.num_proven(match.shared)
        if imports and num_proven < len(match.shared):
            match = Match(match.shared[:num_proven])
        if match.num_partial_tokens and group.is_pending(match.partial):
            # Computing a few tokens again costs less than a copy that fails with the step which computes its source.
            match = match.whole_blocks()
        return Present((match,), match.num_blocks, len(match.shared), num_proven, match.num_partial_tokens)

    def _match_groups(self, hashes: BlockHashes, end: int, num_imported_tokens: int) -> Present:
        found = [[group.find(hashes.digest(index)) for index in range(end)] for group in self.groups]
        num_proven = min(group.num_proven(ids) for group, ids in zip(self.groups, found, strict=True))
        if num_imported_tokens:
            end = num_proven
        # From there on, use only blocks that are pending in all groups. Otherwise a block that is computed again after
        # a failed step may be one that another sequence reads.
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
        """The greatest number of blocks, at most `end`, for which every group has found all that it needs."""
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

"""Which block holds the KV of which prefix.

Owns the digests that name a prefix, the map from digest to block, and the order in which idle blocks are given up.
Doesn't own reference counts or free blocks: `block_manager` does, and tells this cache when a block falls idle.

A full block is named by the digest of (digest of the block before it, its own tokens); the first block's parent is the
request's `cache_salt`. Equal names therefore mean an equal whole prefix and equal salt. Digests are 256 bits of
BLAKE2b: a hit is trusted without comparing tokens, so a collision, even a provoked one, would leak KV between users.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_BYTES = 32


class BlockHashes:
    """Digests of the full blocks of one growing token list, each computed once, on demand."""

    __slots__ = ("_digests", "_parent", "_token_ids", "_tokens_per_block")

    def __init__(self, token_ids: Sequence[int], tokens_per_block: int, cache_salt: str = "") -> None:
        """`token_ids` is kept by reference and may grow at its end, but never change."""
        self._token_ids = token_ids
        self._tokens_per_block = tokens_per_block
        self._digests: list[bytes] = []
        self._parent = blake2b(cache_salt.encode(), digest_size=DIGEST_BYTES).digest()

    def digest(self, index: int) -> bytes:
        """Digest of block `index`, all of whose tokens must be known."""
        digests, width = self._digests, self._tokens_per_block
        while len(digests) <= index:
            first = len(digests) * width
            tokens = self._token_ids[first : first + width]
            assert len(tokens) == width, "only a full block has a digest"
            self._parent = blake2b(self._parent + array("I", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()
            digests.append(self._parent)
        return digests[index]


class PrefixCache:
    """Blocks by the prefix they hold, and those of them that nobody uses, least recently used first."""

    def __init__(self) -> None:
        self._block_by_digest: dict[bytes, int] = {}
        self._digest_by_block: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._digest_by_block

    @property
    def idle_blocks(self) -> OrderedDict[int, None]:
        """Known blocks without a user; the first is evicted next."""
        return self._idle

    def find(self, digest: bytes) -> int | None:
        return self._block_by_digest.get(digest)

    def add(self, block_id: int, digest: bytes) -> None:
        """Remember what `block_id` holds, unless another block holds the same: the older one stays."""
        if digest not in self._block_by_digest and block_id not in self._digest_by_block:
            self._block_by_digest[digest] = block_id
            self._digest_by_block[block_id] = digest

    def mark_idle(self, block_id: int) -> None:
        """The last user of `block_id` is gone; it is now the most recently used of the idle."""
        self._idle[block_id] = None

    def mark_used(self, block_id: int) -> None:
        self._idle.pop(block_id, None)

    def evict(self) -> int:
        """Forget the least recently used idle block and hand it out. KeyError if none is idle."""
        block_id, _ = self._idle.popitem(last=False)
        del self._block_by_digest[self._digest_by_block.pop(block_id)]
        return block_id

    def is_consistent(self) -> bool:
        """Whether both maps mirror each other and every idle block is known."""
        mirrored = {block_id: digest for digest, block_id in self._block_by_digest.items()}
        return mirrored == self._digest_by_block and self._idle.keys() <= self._digest_by_block.keys()

"""The prefix index of one cache group: which block holds the KV of which prefix.

`BlockManager` calls it, and tells it when a block falls idle, which means that no sequence uses it. Owns the digests
that name prefixes, the map from digest to block, the tokens by which a block is found that matches only in part, and
the order in which idle blocks are evicted. Reference counts and free blocks are `BlockManager`'s.

The name of a full block is the digest of its parent and its own tokens. The parent is the digest of the block before
it; that of the first block is the digest of the request's extra keys. So equal names mean an equal whole prefix and
equal keys. Digests are 256 bits of BLAKE2b: a match is trusted without comparing tokens, and a collision, even a
provoked one, would leak KV between users.

A block that is not full has no name. It is found by its parent and its tokens, and can only be reused in part.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

DIGEST_BYTES = 32

# Of the blocks that begin with the wanted token, a partial match looks at so many of the newest.
_MAX_CANDIDATES = 16


ExtraKey = str | bytes

NO_BLOCK = -1
"""An entry of a block table where the sequence holds no block: all its tokens are before the window."""


@dataclass(frozen=True, slots=True)
class Match:
    """The part of a prompt whose KV one group holds. In the order of tokens:

    Attributes:
        num_absent: first blocks of the prompt that are before the window, and not needed.
        shared: blocks on the device that follow.
        host: blocks in host memory that follow.
        partial: a block on the device whose first `num_partial_tokens` tokens follow; -1: none.
        num_partial_tokens: 0: no part of a block is used.
    """

    shared: tuple[int, ...] = ()
    host: tuple[int, ...] = ()
    partial: int = -1
    num_partial_tokens: int = 0
    num_absent: int = 0

    @property
    def num_blocks(self) -> int:
        """Whole blocks of the prompt that need not be computed, those before the window included."""
        return self.num_absent + len(self.shared) + len(self.host)

    def whole_blocks(self) -> Match:
        return replace(self, num_partial_tokens=0)


NOTHING = Match()


class BlockHashes:
    """Digests of the full blocks of one growing token list, each computed once, on demand."""

    __slots__ = ("_digests", "_keys_by_block", "_root", "_token_ids", "_tokens_per_block")

    def __init__(
        self,
        token_ids: Sequence[int],
        tokens_per_block: int,
        extra_keys: Sequence[ExtraKey] = (),
        *,
        keys_at: Sequence[tuple[int, ExtraKey]] = (),
    ) -> None:
        """Keep `token_ids` by reference: it may grow at its end, but never change.

        Args:
            extra_keys: what KV depends on besides the tokens before, from the first block on (a salt, an adapter). Each
                stands at a place of its own, so that a salt is never taken for an adapter.
            keys_at: (position, key): the same from the block on in which that position lies (an image, whose tokens are
                those of any other).
        """
        self._token_ids = token_ids
        self._tokens_per_block = tokens_per_block
        self._digests: list[bytes] = []
        self._root = _digest(b"", extra_keys)
        self._keys_by_block: dict[int, list[ExtraKey]] = {}
        for position, key in keys_at:
            self._keys_by_block.setdefault(position // tokens_per_block, []).extend((str(position), key))

    def digest(self, index: int) -> bytes:
        """Digest of block `index`, all of whose tokens must be known."""
        digests, width = self._digests, self._tokens_per_block
        while len(digests) <= index:
            at = len(digests)
            tokens = self.tokens(at, width)
            assert len(tokens) == width, "only a full block has a digest"
            parent = digests[-1] if digests and not self._keys_by_block else self.parent(at)
            digests.append(blake2b(parent + tokens.tobytes(), digest_size=DIGEST_BYTES).digest())
        return digests[index]

    def parent(self, index: int) -> bytes:
        """The digest of all that comes before block `index`, and of the keys that begin in it."""
        before = self.digest(index - 1) if index else self._root
        keys = self._keys_by_block.get(index)
        return _digest(before, keys) if keys else before

    def tokens(self, index: int, num_tokens: int) -> array[int]:
        """The first `num_tokens` tokens of block `index`, or as many of them as are known."""
        first = index * self._tokens_per_block
        return array("I", self._token_ids[first : first + num_tokens])


def _digest(before: bytes, keys: Sequence[ExtraKey]) -> bytes:
    """The digest of `before` and of the keys, in order. Each key is hashed with its kind (text or bytes) and length, so
    that different lists of keys never give equal input."""
    digest = blake2b(before, digest_size=DIGEST_BYTES, person=b"extra keys")
    for key in keys:
        kind, content = (b"t", key.encode()) if isinstance(key, str) else (b"b", key)
        digest.update(kind + len(content).to_bytes(8, "little") + content)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class _Content:
    """What a block holds: `tokens` after `parent`. `digest` names it if it is full."""

    digest: bytes | None
    parent: bytes
    tokens: array[int]

    @property
    def key(self) -> tuple[bytes, int]:
        return self.parent, self.tokens[0]


class PrefixCache:
    """Blocks by the prefix they hold, and those of them that nobody uses, least recently used first."""

    def __init__(self) -> None:
        self._block_by_digest: dict[bytes, int] = {}
        self._content: dict[int, _Content] = {}
        self._by_first_token: dict[tuple[bytes, int], dict[int, None]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._content

    @property
    def idle_blocks(self) -> OrderedDict[int, None]:
        """Known blocks without a user; the first is evicted next."""
        return self._idle

    def find(self, digest: bytes) -> int | None:
        return self._block_by_digest.get(digest)

    def find_partial(self, parent: bytes, tokens: array[int], only_idle: bool) -> tuple[int, int]:
        """The block that shares most of its first tokens with `tokens`, after `parent`, and how many these are.

        Bounded in cost, so it may miss the best one. Without any, the number is 0 and the block means nothing.

        Args:
            only_idle: leave out blocks that somebody uses.
        """
        best, longest = -1, 0
        siblings = self._by_first_token.get((parent, tokens[0]), {}) if tokens else {}
        for _, block_id in zip(range(_MAX_CANDIDATES), reversed(siblings), strict=False):
            length = _common_length(self._content[block_id].tokens, tokens)
            if length > longest and not (only_idle and block_id not in self._idle):
                best, longest = block_id, length
        return best, longest

    def add(self, block_id: int, hashes: BlockHashes, index: int, num_tokens: int, is_full: bool) -> bool:
        """Remember that `block_id` holds `num_tokens` tokens of block `index` of what `hashes` names.

        Not if another block of the same name is known: the older one stays, and False is returned.
        """
        digest = hashes.digest(index) if is_full else None
        if block_id in self._content or digest in self._block_by_digest:
            return False
        content = _Content(digest, hashes.parent(index), hashes.tokens(index, num_tokens))
        self._content[block_id] = content
        self._by_first_token.setdefault(content.key, {})[block_id] = None
        if digest is not None:
            self._block_by_digest[digest] = block_id
        return True

    def mark_idle(self, block_id: int) -> None:
        """The last user of `block_id` is gone; it is now the most recently used of the idle."""
        self._idle[block_id] = None

    def mark_used(self, block_id: int) -> None:
        self._idle.pop(block_id, None)

    def oldest_idle(self) -> int:
        """The least recently used idle block. StopIteration if none is idle."""
        return next(iter(self._idle))

    def forget(self, block_id: int) -> bytes | None:
        """The content of a known block is lost, or was never there; returns its name if it had one."""
        self._idle.pop(block_id, None)
        content = self._content.pop(block_id)
        siblings = self._by_first_token[content.key]
        del siblings[block_id]
        if not siblings:
            del self._by_first_token[content.key]
        if content.digest is not None:
            del self._block_by_digest[content.digest]
        return content.digest

    def checks(self, num_at_once: int) -> Iterator[bool]:
        """Whether the maps mirror each other and every idle block is known, so many blocks at a time."""
        num_listed = sum(map(len, self._by_first_token.values()))
        num_named = sum(content.digest is not None for content in self._content.values())
        yield num_listed == len(self._content) and num_named == len(self._block_by_digest)
        entries = iter(self._content.items())
        while some := list(itertools.islice(entries, num_at_once)):
            yield all(
                block_id in self._by_first_token.get(content.key, ())
                and (content.digest is None or self._block_by_digest.get(content.digest) == block_id)
                for block_id, content in some
            )
        yield self._idle.keys() <= self._content.keys()


def _common_length(a: array[int], b: array[int]) -> int:
    length = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        length += 1
    return length

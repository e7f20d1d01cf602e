"""A step as plain data: what the device must know of a batch, packed on the host, the same for every rank.

`ModelRunner` packs `BatchItem`s into a `Step`, with `pack_eager` or a `GraphPacker`; each rank's `StepExecutor` runs
it. All numbers of a step stand in one array, so that they reach the device in one copy, and another process in one
message. `GraphPacker` also remembers which block tables the device holds.

There are three kinds of steps. An "eager" one is launched operation by operation, without padding. The others replay a
CUDA graph of fixed size: "decodes" has decodes alone, "mixed" has decodes and chunks. A decode is one token after which
one token is drawn. Everything else that a sequence computes is a chunk: part of its prompt, or a token with drafts
behind it. A step takes the smallest graph that holds it; the rest of the graph is padding.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from pd_kernels.paged_attention import gathered_tokens
from pdserve.engine.schedule.batch import BatchItem
from pdserve.protocol import Key

Array = np.ndarray[Any, Any]

# What a row of a graph holds; slots in the cache groups after the first stand behind, see `slot_of`.
TOKEN, POSITION, SLOT, LENGTH, PREVIOUS = range(5)

# Rows whose logits exist at one time while a prompt is scored: a whole prompt's could outgrow the model.
_SCORED_ROWS = 256
# More tokens than any sequence has: added to the sort key of a chunk, it puts the chunk behind all decodes.
_BEHIND = 1 << 40
# Every fourth size of decodes is also captured with chunks: padding costs little beside a chunk.
_SIZES_A_MIXED_ONE = 4


class Step(msgspec.Struct, frozen=True, omit_defaults=True, tag="step"):
    """One step, for every rank. With G cache groups `values`, int64, has these parts, one after the other:

    - eager: token ids and positions [num_tokens]; slots [G, num_tokens]; q_starts [num_seqs + 1]; seq_lens [num_seqs];
      block tables [G, num_seqs, width]; rows whose token only the device knows, and the items of the step before that
      drew them; rows after which a token is drawn, their items, and their sequences' places in the step. `sizes` are
      the lengths of these parts. Sequences with one new token come first, the longest before the others, as attention
      wants them.
    - decodes: rows [4 + G, size] of token, position, slot, length, item of the step before that drew the token (-1: the
      token is given), and slots in further groups; then places in the flattened block tables [G, sequences, blocks] on
      the device, and what stands there from now on.
    - mixed: rows of decodes [4 + G, size] and of chunks [4 + G, room.num_tokens]; of each sequence with a chunk its
      first row, new tokens and tokens before, and its block tables [G, room.num_seqs, blocks]; the rows after which a
      token is drawn, [size + room.num_seqs], of which the first are meant, and their items likewise; then places and
      blocks as above, for the decodes.

    Attributes:
        sampled_items: of each row after which a token is drawn, the number of its item in the batch.
        size: decodes that the graph has room for; 0 for an eager step.

    Only an eager step has these, which the host reads:
        q_lens, seq_lens: of each sequence its new tokens, and its tokens after the step.
        sampled_lens: of each row after which a token is drawn, the tokens up to it; empty if every row is one.
        scored: (start, stop, item): logits of rows [start, stop) score prompt tokens of that item, in pieces that fit
            into memory.
        exports: (key, start, end) of each sequence whose KV goes to a peer: its tokens before and after the step.
    """

    kind: Literal["eager", "decodes", "mixed"]
    values: Array
    sampled_items: list[int]
    size: int = 0
    sizes: list[int] = []
    q_lens: list[int] = []
    seq_lens: list[int] = []
    sampled_lens: list[int] = []
    scored: list[tuple[int, int, int]] = []
    exports: list[tuple[Key, int, int]] = []


class ChunkRoom(NamedTuple):
    """What a captured step has room for behind its decodes.

    Attributes:
        num_tokens: rows of chunks.
        num_seqs: sequences with a chunk.
        max_context: sum of `gathered_tokens` over these sequences, each with all its tokens after the step.
    """

    num_tokens: int
    num_seqs: int
    max_context: int


def slot_of(group: int) -> int:
    """Which of a graph's rows holds the slots in cache group `group`."""
    return PREVIOUS + group if group else SLOT


def padding_rows(num_groups: int, size: int) -> Array:
    """Rows of a graph, [4 + num_groups, size]: padding is written to no cache and attends over nothing."""
    row = [0, 0, -1, 0, -1, *[-1] * (num_groups - 1)]
    return np.array(row, np.int64)[:, None].repeat(size, axis=1)


def mixed_sizes(sizes: Sequence[int]) -> list[int]:
    """The sizes, of the ascending `sizes`, that are captured with room for chunks as well. The largest is one of
    them."""
    return list(sizes[::-1][::_SIZES_A_MIXED_ONE][::-1])


def pack_eager(items: Sequence[BatchItem], tokens_per_block: int) -> Step:
    """Pack `items`, each of which has at least one token, as an eager step."""
    order = sorted(range(len(items)), key=lambda at: -items[at].start + (len(items[at].token_ids) > 1) * _BEHIND)
    ordered = [items[index] for index in order]
    q_lens = [len(item.token_ids) for item in ordered]
    seq_lens = [item.start + q_len for item, q_len in zip(ordered, q_lens, strict=True)]
    q_starts = [0, *accumulate(q_lens)]
    tables = _block_tables(ordered, seq_lens, tokens_per_block)
    owners = np.repeat(np.arange(len(ordered)), q_lens)
    positions = (
        np.arange(len(owners)) + np.array([i.start - s for i, s in zip(ordered, q_starts, strict=False)])[owners]
    )
    slots = tables[:, owners, positions // tokens_per_block] * tokens_per_block + positions % tokens_per_block
    unknown = [(q_starts[row], item.previous) for row, item in enumerate(ordered) if item.previous is not None]
    sampled = [(q_starts[seq + 1] - 1, order[seq], seq) for seq, item in enumerate(ordered) if item.num_sampled]
    if any(item.num_sampled > 1 for item in items):
        sampled = [
            (row, order[seq], seq)
            for seq, (item, end) in enumerate(zip(ordered, q_starts[1:], strict=True))
            for row in range(end - item.num_sampled, end)
        ]
    parts = [
        np.fromiter(chain.from_iterable(item.token_ids for item in ordered), np.int64, len(owners)),
        positions,
        slots.ravel(),
        np.array(q_starts, np.int64),
        np.array(seq_lens, np.int64),
        tables.ravel(),
        *np.array(unknown, np.int64).reshape(-1, 2).T,
        *np.array(sampled, np.int64).reshape(-1, 3).T,
    ]
    return Step(
        "eager",
        np.concatenate(parts),
        [item for _, item, _ in sampled],
        sizes=[len(part) for part in parts],
        q_lens=q_lens,
        seq_lens=seq_lens,
        sampled_lens=(positions[[row for row, _, _ in sampled]] + 1).tolist() if len(sampled) < len(owners) else [],
        scored=[piece for row, at in enumerate(order) for piece in _scored_rows(items[at], at, q_starts[row])],
        exports=[(i.export_key, i.start, end) for i, end in zip(ordered, seq_lens, strict=True) if i.export_key],
    )


def without_cache_writes(step: Step) -> Step:
    """Set every slot of `step`, an eager one, to -1, so that it writes KV nowhere; returns it."""
    first = sum(step.sizes[:2])
    step.values[first : first + step.sizes[2]] = -1
    return step


def scored_tokens(item: BatchItem) -> list[int]:
    """The prompt tokens that the item's prompt log-probabilities score: those that follow each of its tokens."""
    last = [] if item.next_prompt_token is None else [item.next_prompt_token]
    return [*item.token_ids[1:], *last]


def _scored_rows(item: BatchItem, index: int, first_row: int) -> list[tuple[int, int, int]]:
    if not item.want_prompt_logprobs:
        return []
    stop = first_row + len(scored_tokens(item))
    return [(row, min(row + _SCORED_ROWS, stop), index) for row in range(first_row, stop, _SCORED_ROWS)]


def _block_tables(items: Sequence[BatchItem], seq_lens: Sequence[int], tokens_per_block: int) -> Array:
    """[G, num_items, most blocks of any item]; entries past an item's end, and of blocks that are freed, are 0."""
    counts = [-(-seq_len // tokens_per_block) for seq_len in seq_lens]
    tables = np.zeros((len(items[0].tables), len(items), max(counts)), np.int64)
    for group, of_group in enumerate(tables):
        for row, (item, count) in enumerate(zip(items, counts, strict=True)):
            of_group[row, :count] = item.tables[group][:count]
    return np.maximum(tables, 0, out=tables)


class GraphPacker:
    """Packs for the graphs of `sizes` decodes, ascending, and `mixed_sizes` of them with chunks.

    Args:
        max_blocks: width of the device's block tables.
        pad: whether a step of decodes may run in a larger graph.
        room: what there is beside decodes; None: nothing.
    """

    def __init__(
        self, sizes: Sequence[int], tokens_per_block: int, max_blocks: int, pad: bool, room: ChunkRoom | None = None,
        num_groups: int = 1,
    ) -> None:  # fmt: skip
        self._sizes, self._width, self._max_blocks, self._pad = sizes, tokens_per_block, max_blocks, pad
        self._mixed_sizes, self._room, self._num_groups = mixed_sizes(sizes), room, num_groups
        # By group and row: the sequence's own list, which grows at its end, and how much of it was sent.
        self._sent: list[list[tuple[Sequence[int], int]]] = []
        self.forget()

    def forget(self) -> None:
        """A packed step may not have reached the device: let the next ones send all tables again."""
        self._sent = [[((), 0)] * self._sizes[-1] for _ in range(self._num_groups)]

    def pack(self, items: Sequence[BatchItem]) -> Step | None:
        """Pack `items` for the smallest graph that holds them; None if no graph can run them."""
        is_decode = [_is_decode(item) for item in items]
        if not all(is_decode):
            return self._pack_mixed(items, is_decode)
        size = _smallest(self._sizes, len(items))
        if size is None or not (self._pad or size == len(items)):
            return None
        values = np.concatenate([self._rows(items, size).ravel(), *self._updates(items)])
        return Step("decodes", values, list(range(len(items))), size)

    def _pack_mixed(self, items: Sequence[BatchItem], is_decode: Sequence[bool]) -> Step | None:
        first_chunk = is_decode.index(False)
        sampled_items, chunks = list(range(first_chunk)), list[int]()
        for at in range(first_chunk, len(items)):
            (sampled_items if is_decode[at] else chunks).append(at)
        decodes = [*items[:first_chunk], *(items[at] for at in sampled_items[first_chunk:])]
        room, size = self._room, _smallest(self._mixed_sizes, len(decodes))
        if room is None or size is None or not _fit([items[at] for at in chunks], room):
            return None
        rows, spans = padding_rows(self._num_groups, room.num_tokens), np.zeros((room.num_seqs, 3), np.int64)
        tables = np.zeros((self._num_groups, room.num_seqs, self._max_blocks), np.int64)
        sampled, first = list(range(len(decodes))), 0
        for seq, at in enumerate(chunks):
            item = items[at]
            end, num_tokens = first + len(item.token_ids), len(item.token_ids)
            positions = np.arange(item.start, item.start + num_tokens)
            rows[TOKEN, first:end], rows[POSITION, first:end] = item.token_ids, positions
            for group, block_ids in enumerate(item.tables):
                tables[group, seq, : len(block_ids)] = block_ids
                blocks = tables[group, seq, positions // self._width]
                rows[slot_of(group), first:end] = blocks * self._width + positions % self._width
            spans[seq] = size + first, num_tokens, item.start
            sampled += range(size + end - item.num_sampled, size + end)
            sampled_items += [at] * item.num_sampled
            first = end
        if len(sampled) > size + room.num_seqs:
            return None
        padding = [0] * (size + room.num_seqs - len(sampled))
        told = [np.array([*part, *padding], np.int64) for part in (sampled, sampled_items)]
        np.maximum(tables, 0, out=tables)
        parts = [self._rows(decodes, size).ravel(), rows.ravel(), spans.ravel(), tables.ravel(), *told]
        return Step("mixed", np.concatenate([*parts, *self._updates(decodes)]), sampled_items, size)

    def _rows(self, items: Sequence[BatchItem], size: int) -> Array:
        width = self._width
        rows = padding_rows(self._num_groups, size)
        told = [
            (
                item.token_ids[0],
                item.start,
                item.tables[0][item.start // width] * width + item.start % width,
                item.start + 1,
                -1 if item.previous is None else item.previous,
            )
            for item in items
        ]
        rows[: PREVIOUS + 1, : len(items)] = np.array(told, np.int64).reshape(-1, PREVIOUS + 1).T
        for group in range(1, self._num_groups):
            slots = [item.tables[group][item.start // width] * width + item.start % width for item in items]
            rows[slot_of(group), : len(items)] = slots
        return rows

    def _updates(self, items: Sequence[BatchItem]) -> tuple[Array, Array]:
        """What the device's block tables lack: places in the flattened tables, and the block ids to write there."""
        at: list[int] = []
        values: list[int] = []
        place = 0
        for group, of_group in enumerate(self._sent):
            for row, item in enumerate(items):
                block_ids = item.tables[group]
                owner, sent = of_group[row]
                if owner is not block_ids or sent != len(block_ids):
                    first = sent if owner is block_ids and sent < len(block_ids) else 0
                    start = place + row * self._max_blocks
                    at.extend(range(start + first, start + len(block_ids)))
                    values.extend(block_ids[first:])
                    of_group[row] = (block_ids, len(block_ids))
            place += len(of_group) * self._max_blocks
        # An entry of -1, a freed block, becomes 0: it is never read, but must be a block id.
        return np.array(at, np.int64), np.maximum(np.array(values, np.int64), 0)


def _is_decode(item: BatchItem) -> bool:
    return len(item.token_ids) == 1 == item.num_sampled and not item.want_prompt_logprobs and item.export_key is None


def _fit(chunks: Sequence[BatchItem], room: ChunkRoom) -> bool:
    """Whether `chunks` fit into `room` and fill at least about half of its rows."""
    num_tokens = sum(len(item.token_ids) for item in chunks)
    context = sum(gathered_tokens(item.start + len(item.token_ids)) for item in chunks)
    plain = not any(
        item.want_prompt_logprobs or item.export_key is not None or item.previous is not None for item in chunks
    )
    enough = room.num_tokens < 2 * num_tokens <= 2 * room.num_tokens
    return plain and enough and len(chunks) <= room.num_seqs and context <= room.max_context


def _smallest(sizes: Sequence[int], least: int) -> int | None:
    at = bisect.bisect_left(sizes, least)
    return sizes[at] if at < len(sizes) else None

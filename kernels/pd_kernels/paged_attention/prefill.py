"""The attention of a step's prefills: who computes which part of it, decided once a step and run once a layer.

A prompt with nothing cached before it needs no cache: it attends over the step's own keys and values, which are exact
also where the cache is coarser. Of a long one cuDNN takes what it can; the rest of all of them is one launch of
`prefill_kernel`. A prefill over a cache attends over what the cache holds, its own tokens included: `gather` first lays
that out in dense rows, in the queries' type, at a hundredth of the cost of a long attention: of a window, what its
first new token sees and all after. There, too, cuDNN takes what it can of large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pd_kernels.paged_attention import cudnn
from pd_kernels.paged_attention.batch import PagedBatch
from pd_kernels.paged_attention.layout import GATHER_TOKENS, KvRows, gathered_tokens
from pd_kernels.paged_attention.prefill_kernel import Span, attend, attend_rest, gather, merge, tiles_of
from pd_kernels.paged_attention.spec import AttentionSpec

# Tokens of all sequences that are laid out at once, unless one sequence alone has more.
MAX_GATHERED_TOKENS = 131072


class PrefillAttention:
    """The prefills of a batch, everything after its decodes.

    Args:
        pool: see `pd_kernels.paged_attention.plan`.
        dtype: of the queries.
    """

    def __init__(self, batch: PagedBatch, pool: Tensor, spec: AttentionSpec, dtype: torch.dtype) -> None:
        self._spec = spec
        self._num_tokens = sum(batch.q_lens)
        with_cudnn = cudnn.declines(spec, dtype, pool.device) is None
        own_keys_fit = spec.pitch(dtype.itemsize) == spec.qk_dim
        tables = _Tables(pool.device)
        prefills = list(_prefills(batch, spec))
        fresh = [prefill for prefill in prefills if own_keys_fit and not prefill.num_cached]
        cached = [prefill for prefill in prefills if not own_keys_fit or prefill.num_cached]
        self._fresh = _Fresh(fresh, spec, tables, with_cudnn)
        groups = [_Cached(group, spec, tables, with_cudnn) for group in _groups(cached)]
        self._cached = groups
        self._tables = tables.sent()
        self._pool, self._block_tables = pool, batch.block_tables
        num_rows = max((group.num_rows for group in groups), default=0)
        # Shared by the groups and the layers, which run one after another.
        self._kv = KvRows.empty(num_rows, spec, pool.new_empty(0, dtype=dtype))

    def run(self, qkv: Tensor, layer: int, out: Tensor) -> None:
        """Fill the prefills' rows of `out`, [num_tokens, num_heads * head_dim]."""
        self._fresh.run(qkv, layer, self._tables, out)
        for group in self._cached:
            gather(self._pool, layer, self._block_tables, self._tables[group.gathered], self._kv)
            group.run(qkv, layer, self._kv, self._tables, out)

    def run_alone(self, qkv: Tensor) -> Tensor | None:
        """The step's attention, if the step is a single call of cuDNN, whose output then need not be copied."""
        if self._fresh.squares != [(0, self._num_tokens)]:
            return None
        own = KvRows.of_step(qkv, self._spec).tokens(0, self._num_tokens)
        return cudnn.attend(qkv, own, self._spec, is_causal=True).out.reshape(self._num_tokens, -1)


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence's new tokens, the first of them at `first_token` of the step; none sees a key before `first_key`."""

    seq: int
    first_token: int
    num_tokens: int
    num_cached: int
    first_key: int

    @property
    def num_gathered(self) -> int:
        return gathered_tokens(self.num_cached + self.num_tokens - self.first_key)

    def after(self, num_tokens: int, kv_row: int) -> Span:
        """The new tokens but for the first `num_tokens`; the first key they see is laid out at `kv_row`."""
        seen = self.num_cached + num_tokens + 1
        return Span(self.first_token + num_tokens, self.num_tokens - num_tokens, seen, kv_row - self.first_key)


def _prefills(batch: PagedBatch, spec: AttentionSpec) -> Iterator[_Prefill]:
    first_token = batch.num_decodes
    for seq in range(batch.num_decodes, len(batch.q_lens)):
        num_cached = batch.seq_lens[seq] - batch.q_lens[seq]
        yield _Prefill(seq, first_token, batch.q_lens[seq], num_cached, spec.first_key(num_cached))
        first_token += batch.q_lens[seq]


def _groups(prefills: Sequence[_Prefill]) -> Iterator[list[_Prefill]]:
    """Runs of sequences that are laid out together."""
    group: list[_Prefill] = []
    for prefill in prefills:
        if group and sum(one.num_gathered for one in [*group, prefill]) > MAX_GATHERED_TOKENS:
            yield group
            group = []
        group.append(prefill)
    if group:
        yield group


class _Tables:
    """The tables of a step's launches, which go to the device in one copy that nobody waits for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[tuple[int, int, int, int]] = []

    def add(self, rows: list[tuple[int, int, int, int]]) -> slice:
        """Where `rows` will be in what `sent` returns."""
        self._rows += rows
        return slice(len(self._rows) - len(rows), len(self._rows))

    def sent(self) -> Tensor:
        rows = torch.tensor(self._rows, dtype=torch.int32)
        return rows.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else rows


class _Fresh:
    """Prompts with nothing cached before them; `squares` are the tokens [start, stop) that are cuDNN's alone."""

    def __init__(self, prefills: Sequence[_Prefill], spec: AttentionSpec, tables: _Tables, with_cudnn: bool) -> None:
        self._spec = spec
        self.squares: list[tuple[int, int]] = []
        rest: list[Span] = []
        for prefill in prefills:
            num_rows = cudnn.rows_of_fresh(prefill.num_tokens) if with_cudnn else 0
            if num_rows:
                self.squares.append((prefill.first_token, prefill.first_token + num_rows))
            rest.append(prefill.after(num_rows, kv_row=prefill.first_token))
        self._rest = tables.add(tiles_of(rest, spec.group))

    def run(self, qkv: Tensor, layer: int, tables: Tensor, out: Tensor) -> None:
        own = KvRows.of_step(qkv, self._spec)
        for start, stop in self.squares:
            square = cudnn.attend(qkv[start:stop], own.tokens(start, stop), self._spec, is_causal=True)
            out[start:stop].view(square.out.shape).copy_(square.out)
        if self._rest.start < self._rest.stop:
            attend(qkv, own, tables[self._rest], self._spec, layer, out)


@dataclass(frozen=True, slots=True)
class _Large:
    """New tokens [start, stop) of the step that cuDNN attends for, over themselves and over `num_keys` cached ones.

    `pieces` are the same tokens in the pieces that attend over those, counted from `start`, with the tiles that attend
    over the cached keys left, which may be none.
    """

    start: int
    stop: int
    num_keys: int
    num_cached: int
    kv_row: int
    pieces: list[tuple[int, int, slice]]


class _Cached:
    """Prefills over a cache that are laid out together, in `num_rows` rows, as the table at `gathered` says."""

    def __init__(self, prefills: Sequence[_Prefill], spec: AttentionSpec, tables: _Tables, with_cudnn: bool) -> None:
        self._spec = spec
        self.num_rows = sum(prefill.num_gathered for prefill in prefills)
        self.gathered = tables.add(
            [
                (prefill.seq, at, prefill.num_cached + prefill.num_tokens, 0)
                for prefill in prefills
                for at in range(prefill.first_key, prefill.num_cached + prefill.num_tokens, GATHER_TOKENS)
            ]
        )
        self._large: list[_Large] = []
        rest: list[Span] = []
        kv_row = 0
        for prefill in prefills:
            num_tokens, num_keys = (0, 0)
            if with_cudnn:
                num_tokens, num_keys = cudnn.part_over_cache(prefill.num_tokens, prefill.num_cached)
            if num_tokens:
                self._large.append(self._plan_large(prefill, num_tokens, num_keys, kv_row, tables))
            rest.append(prefill.after(num_tokens, kv_row))
            kv_row += prefill.num_gathered
        self._rest = tables.add(tiles_of(rest, spec.group))

    def _plan_large(self, prefill: _Prefill, num_tokens: int, num_keys: int, kv_row: int, tables: _Tables) -> _Large:
        start, num_cached = prefill.first_token, prefill.num_cached
        pieces = []
        for first, last in cudnn.pieces(num_tokens):
            span = Span(start + first, last - first, num_cached, kv_row)
            tiles = tiles_of([span], self._spec.group, seeded=True) if num_keys < num_cached else []
            pieces.append((first, last, tables.add(tiles)))
        return _Large(start, start + num_tokens, num_keys, num_cached, kv_row, pieces)

    def run(self, qkv: Tensor, layer: int, kv: KvRows, tables: Tensor, out: Tensor) -> None:
        for large in self._large:
            self._run_large(large, qkv, kv, tables, out)
        if self._rest.start < self._rest.stop:
            attend(qkv, kv, tables[self._rest], self._spec, layer, out)

    def _run_large(self, large: _Large, qkv: Tensor, kv: KvRows, tables: Tensor, out: Tensor) -> None:
        spec, new = self._spec, qkv[large.start : large.stop]
        own_row = large.kv_row + large.num_cached
        square = cudnn.attend(new, kv.tokens(own_row, own_row + new.shape[0]), spec, is_causal=True)
        cached = kv.tokens(large.kv_row, large.kv_row + large.num_keys)
        for start, stop, tiles in large.pieces:
            own, first_token = square.tokens(start, stop), large.start + start
            other = cudnn.attend(new[start:stop], cached, spec, is_causal=False)
            if tiles.start < tiles.stop:
                attend_rest(qkv, kv, tables[tiles], spec, out, (own, other), first_token, large.num_keys)
            else:
                merge(own, other, out[first_token : large.start + stop])


def workspace_bytes(spec: AttentionSpec, dtype: torch.dtype, max_tokens: int, max_seq_len: int) -> int:
    """Prefills' part of `pd_kernels.paged_attention.workspace_bytes`."""
    longest = max_seq_len if spec.window is None else min(max_seq_len, spec.window + max_tokens)
    most_gathered = max(min(MAX_GATHERED_TOKENS, max_tokens * longest), longest + GATHER_TOKENS)
    gathered_bytes = most_gathered * 2 * spec.num_kv_heads * spec.pitch(dtype.itemsize) * dtype.itemsize
    partial_bytes = max_tokens * spec.num_heads * (spec.v_dim * dtype.itemsize + 4)
    return gathered_bytes + 2 * partial_bytes


def prepare(pool: Tensor, spec: AttentionSpec, dtype: torch.dtype, max_tokens: int, max_seq_len: int) -> None:
    """See `pd_kernels.paged_attention.prepare`; both limits are at most what the pool holds, which is only read."""
    cases = [(2, 0), (2, 1)]
    if cudnn.declines(spec, dtype, pool.device) is None:
        width = 2 * spec.num_kv_heads * spec.qk_dim
        # Any memory does for keys, and the pool has enough.
        memory = pool.view(-1).view(dtype)
        num_keys = min(max_seq_len, memory.numel() // width)
        cudnn.prepare(memory[: num_keys * width].view(num_keys, width), spec, max_tokens)
        cases += [(cudnn.ROW_STEP, cudnn.KEY_STEP), (cudnn.ROW_STEP + 1, cudnn.KEY_STEP + 1)]
    for num_tokens, num_cached in cases:
        if num_tokens <= max_tokens and num_tokens + num_cached <= max_seq_len:
            _run_once(pool, spec, dtype, num_tokens, num_cached)


def _run_once(pool: Tensor, spec: AttentionSpec, dtype: torch.dtype, num_tokens: int, num_cached: int) -> None:
    """Attend for a prompt whose cache is block 0, over and over."""
    seq_len = num_cached + num_tokens
    starts, lens = torch.tensor([0, num_tokens]), torch.tensor([seq_len])
    tables = torch.zeros((1, -(-seq_len // pool.shape[4])), dtype=torch.int64, device=pool.device)
    batch = PagedBatch([num_tokens], [seq_len], starts, lens, tables)
    qkv = pool.new_zeros((num_tokens, spec.qkv_width), dtype=dtype)
    PrefillAttention(batch, pool, spec, dtype).run(qkv, 0, qkv.new_empty((num_tokens, spec.out_width)))

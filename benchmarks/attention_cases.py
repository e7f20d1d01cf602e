"""Pools, batches and clocks of `benchmarks.attention`; the shape is Llama-3.1-8B's."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pd_kernels.paged_attention import AttentionSpec, PagedBatch

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, TOKENS_PER_BLOCK = 32, 8, 128, 32
DTYPE = torch.bfloat16
SPEC = AttentionSpec.plain(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
QKV_WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
TOKEN_NUMEL = 2 * NUM_KV_HEADS * HEAD_DIM
# More than the L2 cache holds, so that every layer of a graph reads device memory, as it does in a model.
_POOL_NUMEL = 1 << 28
_MAX_LAYERS = 64

Seqs = list[tuple[int, int]]  # new tokens, all tokens


def new_qkv(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, QKV_WIDTH, device="cuda", dtype=DTYPE)


def new_pool(storage: Tensor, num_blocks: int) -> Tensor:
    """A pool over `storage` of as many layers as make it larger than the cache."""
    layer_numel = num_blocks * TOKENS_PER_BLOCK * TOKEN_NUMEL
    num_layers = max(1, min(_MAX_LAYERS, _POOL_NUMEL // layer_numel, storage.numel() // layer_numel))
    shape = (num_blocks, num_layers, 2, NUM_KV_HEADS, TOKENS_PER_BLOCK, HEAD_DIM)
    return storage[: layer_numel * num_layers].view(shape)


def new_batch(seqs: Seqs, num_blocks: int) -> PagedBatch:
    """Sequences over scattered blocks."""
    q_lens, seq_lens = [q_len for q_len, _ in seqs], [seq_len for _, seq_len in seqs]
    counts = [-(-seq_len // TOKENS_PER_BLOCK) for seq_len in seq_lens]
    ids, used = torch.randperm(num_blocks, device="cuda"), 0
    tables = torch.zeros(len(seqs), max(counts), dtype=torch.int64, device="cuda")
    for row, count in enumerate(counts):
        tables[row, :count] = ids[used : used + count]
        used += count
    starts = torch.tensor([0, *itertools.accumulate(q_lens)], device="cuda")
    return PagedBatch(q_lens, seq_lens, starts, torch.tensor(seq_lens, device="cuda"), tables)


def new_step(storage: Tensor, seqs: Seqs) -> tuple[Tensor, PagedBatch, Tensor]:
    """Pool, batch and `qkv`, whose keys and values are in layer 0 of the pool."""
    pool = new_pool(storage, sum(-(-seq_len // TOKENS_PER_BLOCK) for _, seq_len in seqs))
    batch, qkv = new_batch(seqs, pool.shape[0]), new_qkv(sum(q_len for q_len, _ in seqs))
    new = qkv.view(qkv.shape[0], -1, HEAD_DIM)[:, NUM_HEADS:].view(-1, 2, NUM_KV_HEADS, HEAD_DIM).to(pool.dtype)
    token = 0
    for row, (q_len, seq_len) in enumerate(seqs):
        at = torch.arange(seq_len - q_len, seq_len, device="cuda")
        blocks = batch.block_tables[row, at // TOKENS_PER_BLOCK]
        pool[:, 0][blocks, :, :, at % TOKENS_PER_BLOCK] = new[token : token + q_len]
        token += q_len
    return pool, batch, qkv


def decodes(storage: Tensor, num_seqs: int, context: int) -> tuple[Tensor, PagedBatch]:
    pool = new_pool(storage, num_seqs * -(-context // TOKENS_PER_BLOCK))
    return pool, new_batch([(1, context)] * num_seqs, pool.shape[0])


def times_us(work: Callable[[], object], repeats: int) -> list[float]:
    """Device time of each of `repeats` calls."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, stop in events:
        start.record()
        work()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) * 1e3 for start, stop in events]


def median_us(work: Callable[[], object], repeats: int = 7) -> float:
    work()
    return statistics.median(times_us(work, repeats))


def host_us(work: Callable[[], object], repeats: int = 10) -> float:
    """What a call takes the host, while the device is behind."""
    work()
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(repeats):
        work()
    took_s = time.perf_counter() - started_s
    torch.cuda.synchronize()
    return took_s / repeats * 1e6


def causal_flops(seqs: Seqs) -> float:
    """Of one layer, counting what a token may see only."""
    pairs = sum(q_len * (seq_len - q_len) + q_len * (q_len + 1) / 2 for q_len, seq_len in seqs)
    return 4 * NUM_HEADS * HEAD_DIM * pairs


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())

"""Attention compiled for a GPU, with the real cuDNN: large steps, no waiting, nothing left to prepare, graphs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pd_kernels.paged_attention import AttentionSpec, PagedBatch, cudnn, plan, prepare
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan

pytestmark = pytest.mark.gpu

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, TOKENS_PER_BLOCK = 8, 2, 128, 32
SPEC = AttentionSpec.plain(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM)
WIDTH = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
DTYPES = [torch.bfloat16, torch.float8_e4m3fn]
# (new tokens, all tokens): cuDNN has a part in the second, third and fourth.
LARGE = [(1, 77), (2500, 12000), (4096, 4096), (1024, 5120), (40, 9000), (700, 700)]


def new_step(seqs: list[tuple[int, int]], cache_dtype: torch.dtype) -> tuple[PagedBatch, Tensor, Tensor]:
    counts = [-(-seq_len // TOKENS_PER_BLOCK) for _, seq_len in seqs]
    shape = (sum(counts), 2, 2, NUM_KV_HEADS, TOKENS_PER_BLOCK, HEAD_DIM)
    pool = torch.randn(shape, device="cuda").to(cache_dtype)
    tables = torch.zeros(len(seqs), max(counts), dtype=torch.int64, device="cuda")
    ids = torch.randperm(sum(counts), device="cuda").split(counts)
    for row, own in zip(tables, ids, strict=True):
        row[: len(own)] = own
    q_lens, seq_lens = [q_len for q_len, _ in seqs], [seq_len for _, seq_len in seqs]
    starts = torch.tensor([0, *q_lens], device="cuda").cumsum(0)
    batch = PagedBatch(q_lens, seq_lens, starts, torch.tensor(seq_lens, device="cuda"), tables)
    return batch, pool, torch.randn(sum(q_lens), WIDTH, device="cuda", dtype=torch.bfloat16)


@contextmanager
def waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def extras() -> dict[str, Any]:
    """What a spec may ask for besides plain attention."""
    slopes = 2.0 ** -torch.arange(1, NUM_HEADS + 1, device="cuda")
    sinks = torch.randn(2, NUM_HEADS, device="cuda")
    return {"window": 1000, "softcap": 5.0, "sinks": sinks, "alibi": slopes, "scale": 0.1}


@pytest.mark.parametrize("names", ["", "scale", "window", "softcap", "sinks", "alibi", "window softcap sinks alibi"])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_large_steps_agree_with_torch(cache_dtype: torch.dtype, names: str) -> None:
    batch, pool, qkv = new_step(LARGE, cache_dtype)
    spec = replace(SPEC, **{name: value for name, value in extras().items() if name in names.split()})
    for row, (q_len, seq_len) in enumerate(LARGE):
        batch.block_tables[row, : spec.first_key(seq_len - q_len) // TOKENS_PER_BLOCK] = -1
    expected = TorchPlan(batch, pool, spec, qkv.dtype).run(qkv, 1)
    out = TritonPlan(batch, pool, spec, qkv.dtype).run(qkv, 1)
    start = 0
    for q_len in batch.q_lens:
        part, wanted = (x[start : start + q_len].double() for x in (out, expected))
        assert (part - wanted).norm() < 1e-2 * wanted.norm()
        start += q_len


def test_a_step_never_waits_for_the_device() -> None:
    batch, pool, qkv = new_step(LARGE, torch.bfloat16)
    plan(batch, pool, SPEC, "triton").run(qkv, 0)
    with waits_are_errors():
        planned = plan(batch, pool, SPEC, "triton")
        outputs = [planned.run(qkv, layer) for layer in (0, 1)]
    assert all(torch.isfinite(out).all() for out in outputs)


def test_after_preparing_no_length_is_slow() -> None:
    """cuDNN takes 26 ms or more for a shape that it has not seen, and compiling a kernel takes longer."""
    _, pool, _ = new_step([(1, 24000)], torch.bfloat16)
    prepare(pool, SPEC, 3000, "triton")
    torch.cuda.synchronize()
    for seqs in ([(3000, 3000)], [(1025, 5200)], [(2999, 23999)], [(1500, 1500), (77, 1000), (1111, 17000)], [(9, 9)]):
        batch, _, qkv = new_step(seqs, torch.bfloat16)
        batch = PagedBatch(
            batch.q_lens, batch.seq_lens, batch.q_starts, batch.seq_lens_tensor, batch.block_tables % pool.shape[0]
        )
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        plan(batch, pool, SPEC, "triton").run(qkv, 0)
        torch.cuda.synchronize()
        assert time.perf_counter() - started_s < 0.02


@pytest.mark.parametrize("window", [None, 600])
@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
def test_a_graph_of_decodes_holds_for_other_lengths(cache_dtype: torch.dtype, window: int | None) -> None:
    spec = replace(SPEC, window=window)
    batch, pool, qkv = new_step([(1, 3000)] * 3, cache_dtype)
    batch.seq_lens_tensor.fill_(1)
    plan(batch, pool, spec, "triton", qkv.dtype).run(qkv, 0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = plan(batch, pool, spec, "triton", qkv.dtype).run(qkv, 0)
    for lengths in ([3000, 1, 700], [5, 2048, 0]):
        batch.seq_lens_tensor.copy_(torch.tensor(lengths))
        graph.replay()
        again = PagedBatch([1] * 3, lengths, batch.q_starts, batch.seq_lens_tensor, batch.block_tables)
        expected = TorchPlan(again, pool, spec, qkv.dtype).run(qkv, 0)
        torch.testing.assert_close(out[:2], expected[:2], rtol=2e-2, atol=2e-2)
        assert bool(out[2].any()) == (lengths[2] > 0)


def test_cudnn_is_for_half_precision_and_even_heads() -> None:
    device = torch.device("cuda")
    if torch.cuda.get_device_capability() >= (9, 0):
        assert cudnn.declines(SPEC, torch.bfloat16, device) is None
    assert cudnn.declines(SPEC, torch.float32, device)
    assert cudnn.declines(AttentionSpec.plain(8, 2, 20), torch.float16, device)
    assert cudnn.declines(AttentionSpec.plain(8, 2, 256), torch.float16, device)
    assert cudnn.declines(SPEC, torch.float16, torch.device("cpu"))

"""How fast is paged attention on one GPU, and which kernels, tiles and splits should it run?

Checks the Triton plan against the torch plan on the GPU, decodes replayed from a CUDA graph over other lengths
included, then times decodes inside a graph, fresh prompts through each of torch's fused backends and through the Triton
kernel, and what a fused backend takes for the first prompt of a length. The shape is Llama-3.1-8B's.

    python -m benchmarks.attention [--sweep]

`--sweep` also times decodes with other tiles, warps, stages and splits than those that are built in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from pd_kernels.paged_attention import PagedBatch, decode_kernel, fresh_prefill, triton_kernel
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, TOKENS_PER_BLOCK = 32, 8, 128, 32
ROW_BYTES = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM * 2
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2
COPY_BYTES_S = 4.28e12
BATCHES, CONTEXTS, PROMPTS = (1, 16, 64, 256), (128, 1024, 8192), (1024, 2048, 7300, 8192, 32768)
# More than the L2 cache holds, so that every layer of a graph reads device memory, as it does in a model.
_POOL_BYTES = 1 << 29
_MAX_LAYERS = 64


def new_qkv(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, ROW_BYTES // 2, device="cuda", dtype=torch.bfloat16)


def new_pool(storage: Tensor, num_blocks: int) -> Tensor:
    """A pool over `storage` of as many layers as make it larger than the cache."""
    layer_numel = num_blocks * TOKENS_PER_BLOCK * TOKEN_BYTES // 2
    num_layers = max(1, min(_MAX_LAYERS, _POOL_BYTES // (2 * layer_numel)))
    shape = (num_blocks, num_layers, 2, NUM_KV_HEADS, TOKENS_PER_BLOCK, HEAD_DIM)
    return storage[: layer_numel * num_layers].view(shape)


def new_batch(seqs: list[tuple[int, int]], num_blocks: int) -> PagedBatch:
    """Sequences of (new tokens, all tokens) over scattered blocks."""
    q_lens, seq_lens = [q_len for q_len, _ in seqs], [seq_len for _, seq_len in seqs]
    counts = [-(-seq_len // TOKENS_PER_BLOCK) for seq_len in seq_lens]
    ids, used = torch.randperm(num_blocks, device="cuda"), 0
    tables = torch.zeros(len(seqs), max(counts), dtype=torch.int64, device="cuda")
    for row, count in enumerate(counts):
        tables[row, :count] = ids[used : used + count]
        used += count
    starts = torch.tensor([0, *itertools.accumulate(q_lens)], device="cuda")
    return PagedBatch(q_lens, seq_lens, starts, torch.tensor(seq_lens, device="cuda"), tables)


def decodes(storage: Tensor, num_seqs: int, context: int) -> tuple[Tensor, PagedBatch]:
    pool = new_pool(storage, num_seqs * -(-context // TOKENS_PER_BLOCK))
    return pool, new_batch([(1, context)] * num_seqs, pool.shape[0])


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def check(storage: Tensor) -> dict[str, float]:
    """Errors of the Triton plan against the torch plan; raises if one is more than rounding."""
    errors = {}
    seqs = [(1, 5000), (1, 129), (1, 33), (1, 1), (300, 300), (200, 1000), (1500, 1500)]
    cases = {"mixed": seqs, "one": [(1, 8192)], "many": [(1, 1 + 7 * i) for i in range(300, 0, -1)]}
    for name, case in cases.items():
        pool = new_pool(storage, sum(-(-seq_len // TOKENS_PER_BLOCK) for _, seq_len in case))
        batch, qkv, layer = new_batch(case, pool.shape[0]), new_qkv(sum(q_len for q_len, _ in case)), pool.shape[1] - 1
        store_new(batch, pool, qkv, layer)
        expected = TorchPlan(batch, pool, NUM_HEADS).run(qkv, layer)
        errors[name] = relative_error(TritonPlan(batch, pool, NUM_HEADS).run(qkv, layer), expected)
    # Rows 2^31 elements apart in the pool.
    pool, batch = decodes(storage, 256, 8192)
    qkv = new_qkv(256)
    last = PagedBatch([1], [8192], batch.q_starts, batch.seq_lens_tensor[:1], batch.block_tables[255:])
    expected = TorchPlan(last, pool, NUM_HEADS).run(qkv[255:], 0)
    errors["large pool"] = relative_error(TritonPlan(batch, pool, NUM_HEADS).run(qkv, 0)[255:], expected)
    errors["graph"] = check_graph(storage)
    if not all(error < 1e-2 for error in errors.values()):
        raise SystemExit(f"wrong results: {errors}")
    return errors


def store_new(batch: PagedBatch, pool: Tensor, qkv: Tensor, layer: int) -> None:
    """Write the keys and values of new tokens to the pool, as a step does."""
    new = qkv.view(qkv.shape[0], -1, HEAD_DIM)[:, NUM_HEADS:].view(-1, 2, NUM_KV_HEADS, HEAD_DIM)
    token = 0
    for row, (q_len, seq_len) in enumerate(zip(batch.q_lens, batch.seq_lens, strict=True)):
        at = torch.arange(seq_len - q_len, seq_len, device="cuda")
        blocks = batch.block_tables[row, at // TOKENS_PER_BLOCK]
        pool[:, layer][blocks, :, :, at % TOKENS_PER_BLOCK] = new[token : token + q_len]
        token += q_len


def check_graph(storage: Tensor) -> float:
    """Capture at one set of lengths, replay at others, with rows of padding."""
    pool, batch = decodes(storage, 4, 4096)
    qkv, out = new_qkv(4), torch.empty(4, NUM_HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    lengths = batch.seq_lens_tensor
    lengths.fill_(1)
    graph = graph_of(lambda: out.copy_(TritonPlan(batch, pool, NUM_HEADS).run(qkv, 0)) is None)
    worst = 0.0
    for new_lens in ([4096, 1000, 1, 0], [33, 0, 4095, 2048]):
        lengths.copy_(torch.tensor(new_lens))
        out.fill_(float("nan"))
        graph.replay()
        for row, seq_len in enumerate(new_lens):
            if not seq_len:
                worst = max(worst, float(out[row].float().abs().max()))
                continue
            alone = PagedBatch([1], [seq_len], lengths, lengths[row : row + 1], batch.block_tables[row : row + 1])
            expected = TorchPlan(alone, pool, NUM_HEADS).run(qkv[row : row + 1], 0)
            worst = max(worst, relative_error(out[row : row + 1], expected))
    return worst


def time_decode(pool: Tensor, batch: PagedBatch, num_splits: int | None = None, min_tiles: int | None = None) -> float:
    """Microseconds of one layer, inside a graph of all layers of the pool."""
    num_seqs, num_layers = len(batch.q_lens), pool.shape[1]
    qkv, out = new_qkv(num_seqs), torch.empty(num_seqs, NUM_HEADS * HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    attention = DecodeAttention(
        batch.seq_lens_tensor, batch.block_tables, pool, num_seqs, NUM_HEADS, num_splits, min_tiles
    )

    def layers() -> None:
        for layer in range(num_layers):
            attention.run(qkv, layer, out)

    return median_us(graph_of(layers).replay) / num_layers


def time_eager(pool: Tensor, batch: PagedBatch) -> float:
    """Microseconds of one layer, launched one by one."""
    qkv, num_layers = new_qkv(len(batch.q_lens)), pool.shape[1]
    plan = TritonPlan(batch, pool, NUM_HEADS)

    def layers() -> None:
        for layer in range(num_layers):
            plan.run(qkv, layer)

    return median_us(layers) / num_layers


def bench_decode(storage: Tensor) -> Iterator[dict[str, Any]]:
    for num_seqs, context in itertools.product(BATCHES, CONTEXTS):
        pool, batch = decodes(storage, num_seqs, context)
        graph_us, eager_us = time_decode(pool, batch), time_eager(pool, batch)
        bytes_s = num_seqs * context * TOKEN_BYTES / graph_us * 1e6
        yield {
            "seqs": num_seqs, "context": context, "graph_us": round(graph_us, 2), "eager_us": round(eager_us, 2),
            "gb_s": round(bytes_s / 1e9), "of_copy": round(bytes_s / COPY_BYTES_S, 3),
        }  # fmt: skip


def uneven(storage: Tensor, num_seqs: int, longest: int) -> tuple[Tensor, PagedBatch]:
    """Lengths spread evenly on a logarithmic scale, longest first."""
    lengths = [int(longest * 64 ** -(index / num_seqs)) for index in range(num_seqs)]
    pool = new_pool(storage, sum(-(-length // TOKENS_PER_BLOCK) for length in lengths))
    return pool, new_batch([(1, length) for length in lengths], pool.shape[0])


def sweep_uneven(storage: Tensor) -> Iterator[dict[str, Any]]:
    for num_seqs, longest in itertools.product((16, 64, 256), (2048, 16384)):
        case = uneven(storage, num_seqs, longest)
        times = {"chosen": round(time_decode(*case), 2)}
        for splits, min_tiles in itertools.product((1, 2, 4, 8, 16), (8, 32)):
            times[f"{splits}/{min_tiles}"] = round(time_decode(*case, splits, min_tiles), 2)
        yield {"seqs": num_seqs, "longest": longest, **times}


def sweep_tiles(storage: Tensor) -> Iterator[dict[str, Any]]:
    cases = {"1x1024": (1, 1024), "16x1024": (16, 1024), "64x1024": (64, 1024), "64x8192": (64, 8192)}
    made = {name: decodes(storage, *case) for name, case in cases.items()}
    for tile_bytes, num_warps, num_stages in itertools.product((8192, 16384, 32768), (2, 4, 8), (2, 3, 4)):
        if tile_bytes * num_stages > 98304:
            continue
        names = {"_TILE_BYTES": tile_bytes, "_NUM_WARPS": num_warps, "_NUM_STAGES": num_stages}
        with mock.patch.multiple(decode_kernel, **names):
            times = {name: round(time_decode(*case), 2) for name, case in made.items()}
        yield {"block_n": tile_bytes // 256, "warps": num_warps, "stages": num_stages, **times}


def sweep_splits(storage: Tensor) -> Iterator[dict[str, Any]]:
    for num_seqs, context in itertools.product((1, 4, 16, 64, 256), CONTEXTS):
        case = decodes(storage, num_seqs, context)
        times = {str(splits): round(time_decode(*case, splits, 1), 2) for splits in (1, 2, 4, 8, 16, 32, 64)}
        yield {"seqs": num_seqs, "context": context, **times}


def time_prefill(attend: Callable[[], Tensor], num_tokens: int) -> dict[str, float]:
    took_us = median_us(lambda: attend() is None, 5)
    flops = 4 * NUM_HEADS * HEAD_DIM * num_tokens * (num_tokens + 1) / 2
    return {"us": round(took_us, 1), "tflop_s": round(flops / took_us / 1e6, 1)}


def bench_prefill(storage: Tensor) -> Iterator[dict[str, Any]]:
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for num_tokens in PROMPTS:
        pool = new_pool(storage, -(-num_tokens // TOKENS_PER_BLOCK))
        batch, qkv = new_batch([(num_tokens, num_tokens)], pool.shape[0]), new_qkv(num_tokens)
        store_new(batch, pool, qkv, 0)
        for name, backend in backends.items():
            with mock.patch.multiple(fresh_prefill, _SHORT=[backend], _LONG_TOKENS=1 << 30):
                timed = time_prefill(lambda qkv=qkv: fresh_prefill.attend(qkv, NUM_HEADS, HEAD_DIM), num_tokens)
            yield {"tokens": num_tokens, "path": name, **timed}
        with mock.patch.object(fresh_prefill, "is_supported", return_value=False):
            plan = TritonPlan(batch, pool, NUM_HEADS)
        yield {"tokens": num_tokens, "path": "triton", **time_prefill(lambda p=plan, q=qkv: p.run(q, 0), num_tokens)}
        chosen = TritonPlan(batch, pool, NUM_HEADS)
        yield {"tokens": num_tokens, "path": "plan", **time_prefill(lambda p=chosen, q=qkv: p.run(q, 0), num_tokens)}


def bench_new_lengths() -> Iterator[dict[str, Any]]:
    """What the first, second and third prompt of a length take, in milliseconds seen by the host."""
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for (name, backend), num_tokens in itertools.product(backends.items(), (777, 1001, 1517, 2033, 3111)):
        qkv = new_qkv(num_tokens)
        with mock.patch.multiple(fresh_prefill, _SHORT=[backend], _LONG_TOKENS=1 << 30):
            took_us = times_us(lambda qkv=qkv: fresh_prefill.attend(qkv, NUM_HEADS, HEAD_DIM) is None, 3)
        yield {"path": name, "tokens": num_tokens, "ms": [round(us / 1e3, 3) for us in took_us]}


def sweep_prefill(storage: Tensor) -> Iterator[dict[str, Any]]:
    pool = new_pool(storage, 8192 // TOKENS_PER_BLOCK)
    batch, qkv = new_batch([(8192, 8192)], pool.shape[0]), new_qkv(8192)
    with mock.patch.object(fresh_prefill, "is_supported", return_value=False):
        plan = TritonPlan(batch, pool, NUM_HEADS)
    kernel = triton_kernel._prefill_kernel
    for block_m, block_n, num_warps, num_stages in itertools.product((64, 128), (64, 128), (4, 8), (2, 3)):
        tile = {"BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}

        class Tuned:
            def __getitem__(self, grid: tuple[int, ...], tile: dict[str, int] = tile) -> Callable[..., Any]:
                return lambda *args, **names: kernel[grid](*args, **{**names, **tile})

        with (
            mock.patch.object(triton_kernel, "_prefill_kernel", Tuned()),
            mock.patch.object(triton_kernel, "_BLOCK_M", block_m),
        ):
            yield {"block_m": block_m, **tile, **time_prefill(lambda: plan.run(qkv, 0), 8192)}


def table(title: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    print(f"\n{title}", flush=True)
    kept = []
    for row in rows:
        if not kept:
            print("  ".join(f"{name:>9}" for name in row))
        print("  ".join(f"{value!s:>9}" for value in row.values()), flush=True)
        kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles and splits, too")
    args = parser.parse_args()
    torch.manual_seed(0)
    largest = max(BATCHES) * max(CONTEXTS) * TOKEN_BYTES // 2
    storage = torch.randn(largest, device="cuda", dtype=torch.bfloat16)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["errors"] = check(storage)
    print(f"errors against the torch plan: {results['errors']}")
    results["decode"] = table("decode, one layer", bench_decode(storage))
    results["prefill"] = table("fresh prompt, one layer", bench_prefill(storage))
    results["new_lengths"] = table("first prompts of a length", bench_new_lengths())
    if args.sweep:
        results["splits"] = table("decode, one layer in us, by number of splits", sweep_splits(storage))
        results["uneven"] = table("decode, uneven lengths, by splits/tiles of a share", sweep_uneven(storage))
        results["prefill_tiles"] = table("Triton prefill of 8192 tokens", sweep_prefill(storage))
        results["tiles"] = table("decode, one layer in us, by tile", sweep_tiles(storage))
    print(json.dumps(results))


if __name__ == "__main__":
    main()

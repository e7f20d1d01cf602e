"""How fast is paged attention on one GPU, and which kernels, tiles and splits should it run?

Checks the Triton plan against the torch plan on the GPU, decodes replayed from a CUDA graph over other lengths
included, then times decodes inside a graph, and prefills: fresh prompts, prompts packed in one step, and chunks over a
cached prefix, with cuDNN and without, over a cache of bfloat16 and of float8; then both with windows and softcaps. Says
how long `prepare` takes, and what the first step of a length takes after it. The shape is Llama-3.1-8B's.

    python -m benchmarks.attention [--sweep]

`--sweep` also times decodes with other tiles, warps, stages and splits than those that are built in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.attention_cases import (
    DTYPE,
    HEAD_DIM,
    NUM_HEADS,
    SPEC,
    TOKEN_NUMEL,
    TOKENS_PER_BLOCK,
    Seqs,
    causal_flops,
    decodes,
    host_us,
    median_us,
    new_batch,
    new_pool,
    new_qkv,
    new_step,
    relative_error,
)
from benchmarks.device_time import graph_of, table
from benchmarks.report import warn_if_busy
from pd_kernels.paged_attention import AttentionSpec, PagedBatch, cudnn, decode_kernel, prepare
from pd_kernels.paged_attention.decode_kernel import DecodeAttention
from pd_kernels.paged_attention.reference import TorchPlan
from pd_kernels.paged_attention.triton_kernel import TritonPlan

COPY_BYTES_S = 4.28e12
BATCHES, CONTEXTS = (1, 16, 64, 256), (128, 1024, 8192)
MAX_TOKENS = 8192
SPECS = {
    "plain": SPEC,
    "window 1024": replace(SPEC, window=1024),
    "window 4096": replace(SPEC, window=4096),
    "softcap": replace(SPEC, softcap=50.0),
    "window 1024, softcap": replace(SPEC, window=1024, softcap=50.0),
}
STEPS: dict[str, Seqs] = {
    "1024": [(1024, 1024)],
    "2048": [(2048, 2048)],
    "4096": [(4096, 4096)],
    "7300": [(7300, 7300)],
    "8192": [(8192, 8192)],
    "8 of 1024": [(1024, 1024)] * 8,
    "64 of 128": [(128, 128)] * 64,
    "8192 after 8192": [(8192, 16384)],
    "8192 after 16384": [(8192, 24576)],
    "8192 after 24576": [(8192, 32768)],
    "8192 after 122880": [(8192, 131072)],
    "5000 after 20000": [(5000, 25000)],
    "1000 after 20000": [(1000, 21000)],
    "32 after 8192": [(32, 8224)],
    "16 x 512 after 4096": [(512, 4608)] * 16,
}


def check(storage: Tensor) -> dict[str, float]:
    """Errors of the Triton plan against the torch plan; raises if one is more than rounding."""
    errors = {}
    mixed = [(1, 5000), (1, 129), (1, 33), (1, 1), (300, 300), (200, 1000), (1500, 1500)]
    large = [(1, 77), (2500, 12000), (4096, 4096), (3000, 3000), (1024, 5120), (40, 9000)]
    cases = {"mixed": mixed, "large": large, "many": [(1, 1 + 7 * i) for i in range(300, 0, -1)]}
    for name, case in cases.items():
        errors[name] = error_of(*new_step(storage, case))
    for name, spec in SPECS.items():
        errors[name] = error_of(*new_step(storage, mixed), spec)
    # Rows 2^31 elements apart in the pool.
    pool, batch = decodes(storage, 256, 8192)
    qkv = new_qkv(256)
    last = PagedBatch([1], [8192], batch.q_starts, batch.seq_lens_tensor[:1], batch.block_tables[255:])
    expected = TorchPlan(last, pool, SPEC, DTYPE).run(qkv[255:], 0)
    errors["large pool"] = relative_error(TritonPlan(batch, pool, SPEC, DTYPE).run(qkv, 0)[255:], expected)
    errors["graph"] = check_graph(storage)
    if not all(error < 1e-2 for error in errors.values()):
        raise SystemExit(f"wrong results: {errors}")
    return errors


def error_of(pool: Tensor, batch: PagedBatch, qkv: Tensor, spec: AttentionSpec = SPEC) -> float:
    plans = [plan(batch, pool, spec, DTYPE) for plan in (TritonPlan, TorchPlan)]
    return relative_error(plans[0].run(qkv, 0), plans[1].run(qkv, 0))


def check_graph(storage: Tensor) -> float:
    """Capture at one set of lengths, replay at others, with rows of padding."""
    pool, batch = decodes(storage, 4, 4096)
    qkv, out = new_qkv(4), torch.empty(4, NUM_HEADS * HEAD_DIM, device="cuda", dtype=DTYPE)
    lengths = batch.seq_lens_tensor
    lengths.fill_(1)
    graph = graph_of(lambda: out.copy_(TritonPlan(batch, pool, SPEC, DTYPE).run(qkv, 0)) is None)
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
            expected = TorchPlan(alone, pool, SPEC, DTYPE).run(qkv[row : row + 1], 0)
            worst = max(worst, relative_error(out[row : row + 1], expected))
    return worst


def time_decode(
    pool: Tensor, batch: PagedBatch, num_splits: int | None = None, min_tiles: int | None = None,
    spec: AttentionSpec = SPEC,
) -> float:  # fmt: skip
    """Microseconds of one layer, inside a graph of all layers of the pool."""
    num_seqs, num_layers = len(batch.q_lens), pool.shape[1]
    qkv, out = new_qkv(num_seqs), torch.empty(num_seqs, NUM_HEADS * HEAD_DIM, device="cuda", dtype=DTYPE)
    attention = DecodeAttention(batch.seq_lens_tensor, batch.block_tables, pool, num_seqs, spec, num_splits, min_tiles)

    def layers() -> None:
        for layer in range(num_layers):
            attention.run(qkv, layer, out)

    return median_us(graph_of(layers).replay) / num_layers


def time_eager(pool: Tensor, batch: PagedBatch) -> float:
    """Microseconds of one layer, launched one by one."""
    qkv, num_layers = new_qkv(len(batch.q_lens)), pool.shape[1]
    plan = TritonPlan(batch, pool, SPEC, DTYPE)

    def layers() -> None:
        for layer in range(num_layers):
            plan.run(qkv, layer)

    return median_us(layers) / num_layers


def bench_decode(storage: Tensor) -> Iterator[dict[str, Any]]:
    for num_seqs, context in itertools.product(BATCHES, CONTEXTS):
        pool, batch = decodes(storage, num_seqs, context)
        graph_us, eager_us = time_decode(pool, batch), time_eager(pool, batch)
        bytes_s = num_seqs * context * TOKEN_NUMEL * pool.element_size() / graph_us * 1e6
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


def bench_prepare(storage: Tensor) -> Iterator[dict[str, Any]]:
    """Twice: the second time, libraries are loaded and kernels are compiled, as after a restart."""
    pool = new_pool(storage, 131072 // TOKENS_PER_BLOCK)
    attend, shapes = cudnn.attend, []

    def counted(*args: Any, **names: Any) -> Any:
        shapes.append(args[1].shape)
        return attend(*args, **names)

    for attempt in ("first", "again"):
        shapes.clear()
        started_s = time.perf_counter()
        with mock.patch.object(cudnn, "attend", counted):
            prepare(pool, SPEC, MAX_TOKENS, "triton", DTYPE)
        torch.cuda.synchronize()
        yield {"prepare": attempt, "cudnn_calls": len(shapes), "s": round(time.perf_counter() - started_s, 2)}


def bench_first_steps(storage: Tensor) -> Iterator[dict[str, Any]]:
    """What plan and one layer take the host for lengths never seen before, and then again."""
    for q_len, seq_len in (
        (777, 777),
        (2049, 2049),
        (7777, 7777),
        (1025, 6001),
        (8191, 70001),
        (3333, 12345),
        (9, 50001),
    ):
        pool, batch, qkv = new_step(storage, [(q_len, seq_len)])
        took_ms = []
        for _ in range(3):
            torch.cuda.synchronize()
            started_s = time.perf_counter()
            plan = TritonPlan(batch, pool, SPEC, DTYPE)
            planned_s = time.perf_counter()
            plan.run(qkv, 0)
            took_ms.append(round((time.perf_counter() - started_s) * 1e3, 2))
        yield {"new": q_len, "all": seq_len, "host_ms": took_ms, "plan_ms": round((planned_s - started_s) * 1e3, 2)}


def bench_prefill(storage: Tensor) -> Iterator[dict[str, Any]]:
    for name, seqs in STEPS.items():
        pool, batch, qkv = new_step(storage, seqs)
        plan = TritonPlan(batch, pool, SPEC, DTYPE)
        with mock.patch.object(cudnn, "declines", return_value="not now"):
            alone = TritonPlan(batch, pool, SPEC, DTYPE)
        row = {"step": name}
        for path, chosen in (("", plan), ("triton_", alone)):
            took_us = median_us(lambda chosen=chosen, qkv=qkv: chosen.run(qkv, 0))
            row |= {f"{path}us": round(took_us, 1), f"{path}tflop_s": round(causal_flops(seqs) / took_us / 1e6, 1)}
        yield row | {"host_us": round(host_us(lambda plan=plan, qkv=qkv: plan.run(qkv, 0)), 1)}


def bench_specs(storage: Tensor) -> Iterator[dict[str, Any]]:
    decode = decodes(storage, 64, 8192)
    for name, spec in SPECS.items():
        row: dict[str, Any] = {"spec": name, "decode 64x8192": round(time_decode(*decode, spec=spec), 2)}
        for step in ("8192", "8192 after 24576"):
            pool, batch, qkv = new_step(storage, STEPS[step])
            plan = TritonPlan(batch, pool, spec, DTYPE)
            row[step] = round(median_us(lambda plan=plan, qkv=qkv: plan.run(qkv, 0)), 1)
        yield row


def bench_cache(name: str, storage: Tensor) -> dict[str, Any]:
    """Everything that depends on the type of the cache."""
    results: dict[str, Any] = {"errors": check(storage)}
    print(f"\ncache of {name}: errors against the torch plan: {results['errors']}")
    results["decode"] = table(f"decode, one layer, cache of {name}", bench_decode(storage))
    results["prefill"] = table(f"prefill, one layer, cache of {name}", bench_prefill(storage))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="time other tiles and splits, too")
    args = parser.parse_args()
    warn_if_busy()
    torch.manual_seed(0)
    storage = torch.randn(max(BATCHES) * max(CONTEXTS) * TOKEN_NUMEL, device="cuda", dtype=DTYPE)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    results["prepare"] = table("prepare", bench_prepare(storage))
    results["first_steps"] = table("first steps of a length, one layer", bench_first_steps(storage))
    results["bfloat16"] = bench_cache("bfloat16", storage)
    results["specs"] = table("kinds of attention, one layer in us", bench_specs(storage))
    results["float8"] = bench_cache("float8", storage.to(torch.float8_e4m3fn))
    if args.sweep:
        results["splits"] = table("decode, one layer in us, by number of splits", sweep_splits(storage))
        results["uneven"] = table("decode, uneven lengths, by splits/tiles of a share", sweep_uneven(storage))
        results["tiles"] = table("decode, one layer in us, by tile", sweep_tiles(storage))
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""How fast are products of a few rows with a model's matrices on one GPU, ours and torch's (cuBLAS)?

Checks both against double precision, then times each shape and number of rows inside a CUDA graph that cycles through
more weights than the L2 cache holds, and last a whole step's products with what stands between them in a decoder.

    python -m benchmarks.few_row_matmul
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.device_time import graph_of, replay_us, table
from benchmarks.report import warn_if_busy
from pd_kernels.few_row_matmul import few_row_matmul, tiling_for
from pd_kernels.rms_norm import add_rms_norm
from pd_kernels.silu_and_mul import silu_and_mul

ROWS = (1, 2, 4, 8, 16, 24, 32)
# [num_outputs, num_inputs] of qkv, o, gate_up, down (and lm_head).
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "llama-8b": {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
        "lm_head": (128256, 4096),
    },
    "llama-8b, half": {"qkv": (3072, 4096), "o": (4096, 2048), "gate_up": (14336, 4096), "down": (4096, 7168)},
    "llama-1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "qwen-7b": {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
}  # fmt: skip
NUM_LAYERS, HIDDEN, INTERMEDIATE = 32, 4096, 14336
_CYCLED_BYTES = 600_000_000

Multiply = Callable[[Tensor, Tensor], Tensor]


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def weights_of(storage: Tensor, shape: tuple[int, int]) -> list[Tensor]:
    """Matrices that together are larger than the cache."""
    numel = shape[0] * shape[1]
    count = max(2, min(NUM_LAYERS, _CYCLED_BYTES // (2 * numel)))
    return [storage[i * numel : (i + 1) * numel].view(shape) for i in range(count)]


def time_us(multiply: Multiply, x: Tensor, weights: list[Tensor]) -> float:
    def work() -> None:
        for weight in weights:
            multiply(x, weight)

    return replay_us(graph_of(work)) / len(weights)


def bench(storage: Tensor, shapes: dict[str, tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for name, shape in shapes.items():
        weights = weights_of(storage, shape)
        for num_rows in ROWS:
            x = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
            if tiling_for(num_rows, weights[0]) is None:
                continue
            exact = x.double() @ weights[0][:2048].double().T
            errors = [
                relative_error(multiply(x, weights[0])[:, :2048], exact)
                for multiply in (few_row_matmul, functional.linear)
            ]
            if not errors[0] < 1.01 * errors[1]:
                raise SystemExit(f"{name}, {num_rows} rows: error {errors[0]}, torch's {errors[1]}")
            ours_us, torch_us = time_us(few_row_matmul, x, weights), time_us(functional.linear, x, weights)
            yield {
                "matrix": name, "rows": num_rows, "torch_us": round(torch_us, 2), "ours_us": round(ours_us, 2),
                "ratio": round(torch_us / ours_us, 3), "gb_s": round(2 * weights[0].numel() / ours_us / 1e3),
            }  # fmt: skip


def bench_step(storage: Tensor) -> Iterator[dict[str, Any]]:
    """A decode step of Llama-8B without its attention, milliseconds."""
    shapes, offset = MODELS["llama-8b"], 0
    layers: list[dict[str, Tensor]] = []
    for index in range(NUM_LAYERS + 1):
        names = ["qkv", "o", "gate_up", "down"] if index < NUM_LAYERS else ["lm_head"]
        layer = {}
        for name in names:
            numel = shapes[name][0] * shapes[name][1]
            layer[name] = storage[offset : offset + numel].view(shapes[name])
            offset += numel
        layers.append(layer)
    norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    for num_rows in ROWS:
        hidden = torch.randn(num_rows, HIDDEN, device="cuda", dtype=torch.bfloat16)

        def step(multiply: Multiply, hidden: Tensor = hidden) -> None:
            residual = hidden.clone()
            x = add_rms_norm(hidden, residual, norm, 1e-5)
            for layer in layers[:-1]:
                attended = multiply(x, layer["qkv"])[:, :HIDDEN]
                x = add_rms_norm(multiply(attended, layer["o"]), residual, norm, 1e-5)
                mlp = multiply(silu_and_mul(multiply(x, layer["gate_up"])), layer["down"])
                x = add_rms_norm(mlp, residual, norm, 1e-5)
            multiply(x, layers[-1]["lm_head"])

        torch_ms = replay_us(graph_of(lambda: step(functional.linear))) / 1e3
        ours_ms = replay_us(graph_of(lambda: step(few_row_matmul))) / 1e3
        yield {
            "rows": num_rows, "torch_ms": round(torch_ms, 3), "ours_ms": round(ours_ms, 3),
            "ratio": round(torch_ms / ours_ms, 3),
        }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warn_if_busy()
    torch.manual_seed(0)
    largest = sum(NUM_LAYERS * n * k if name != "lm_head" else n * k for name, (n, k) in MODELS["llama-8b"].items())
    storage = torch.empty(largest, device="cuda", dtype=torch.bfloat16).normal_(0, 0.02)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for model, shapes in MODELS.items():
        results[model] = table(model, bench(storage, shapes))
    results["step"] = table("a step's products, norms and activations", bench_step(storage))
    print(json.dumps(results))


if __name__ == "__main__":
    main()

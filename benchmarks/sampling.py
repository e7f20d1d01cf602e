"""How long does sampling take on one GPU, by batch and filter, and is it what the torch oracle draws?

Compares draws with the oracle's on the CPU, rows alone with rows in a batch, and CUDA graphs with launches; then times
each filter inside a graph that cycles through more logits than the L2 cache holds. Logits are normal: with deviation 1
a flat distribution, which filters find hardest, with 4 one whose head is small, as a language model's is.

    python -m benchmarks.sampling
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.device_time import graph_of, replay_us, table
from benchmarks.report import warn_if_busy
from pd_kernels.sampling import reference, sample

VOCAB_SIZE = 128256
BATCHES, DEVIATIONS = (1, 16, 64, 256), (1.0, 4.0)
_BUFFER_BYTES = 1 << 28
_MAX_BUFFERS = 64


def new_parameters(num_rows: int, seed: int) -> list[Tensor]:
    """Temperature, top-k, top-p, min-p and number of rows of all kinds, on the CPU."""
    random = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(num_rows, generator=random, dtype=torch.float64)

    def sometimes(chance: float, values: Tensor, otherwise: float) -> Tensor:
        return values.where(uniform() < chance, otherwise)

    temperature = sometimes(0.8, uniform() * 1.5 + 0.1, 0.0)
    top_k = sometimes(0.6, (uniform() * 2000).floor(), 0.0)
    return [temperature, top_k, sometimes(0.7, uniform(), 1.0), sometimes(0.5, uniform() / 5, 0.0), uniform()]


def check() -> dict[str, int]:
    """Rows that differ from the oracle's, which rounding may cause now and then; raises if rows depend on others."""
    differing = compared = 0
    for vocab_size, deviation in itertools.product((VOCAB_SIZE, 151936, 32003, 1000), (0.3, 1.0, 4.0)):
        logits = torch.randn(24, vocab_size) * deviation
        logits[1], logits[3] = logits[1].round(), 0.0
        logits[2, 100:200] = float("-inf")
        parameters = new_parameters(len(logits), vocab_size)
        device_logits, device_parameters = logits.cuda(), [column.cuda() for column in parameters]
        drawn = sample(device_logits, *device_parameters)
        differing += int((drawn.cpu() != reference.sample(logits, *parameters)).sum())
        compared += len(logits)
        alone = [sample(logits[i : i + 1].cuda(), *(c[i : i + 1] for c in device_parameters)) for i in range(24)]
        out = torch.full_like(drawn, -1)
        graph_of(
            lambda logits=device_logits, given=device_parameters, out=out: sample(logits, *given, out=out)
        ).replay()
        if not torch.equal(torch.cat(alone), drawn) or not torch.equal(out, drawn):
            raise SystemExit(f"a row depends on its batch: vocabulary {vocab_size}, deviation {deviation}")
    if differing > compared / 50:
        raise SystemExit(f"{differing} of {compared} rows differ from the oracle's")
    return {"rows": compared, "differing": differing}


def bench(deviation: float) -> Iterator[dict[str, Any]]:
    for num_rows in BATCHES:
        num_buffers = max(2, min(_MAX_BUFFERS, _BUFFER_BYTES // (num_rows * VOCAB_SIZE * 4)))
        buffers = [torch.randn(num_rows, VOCAB_SIZE, device="cuda") * deviation for _ in range(num_buffers)]
        shared = [torch.full((num_rows,), value, device="cuda") for value in (0.8, 50, 0.9, 0.05)]
        temperature, top_k, top_p, min_p = shared
        number, out = torch.rand(num_rows, device="cuda"), torch.empty(num_rows, dtype=torch.int64, device="cuda")
        cases: dict[str, list[Tensor | None]] = {
            "greedy": [None, None, None, None, None],
            "temperature": [temperature, None, None, None, number],
            "min_p": [temperature, None, None, min_p, number],
            "top_k": [temperature, top_k, None, None, number],
            "top_p": [temperature, None, top_p, None, number],
            "k_and_p": [temperature, top_k, top_p, None, number],
        }
        times = {name: time_us(buffers, given, out) for name, given in cases.items()}
        yield {"rows": num_rows, **times, "torch_argmax": time_us(buffers, None, out)}


def time_us(buffers: list[Tensor], given: list[Tensor | None] | None, out: Tensor) -> float:
    """Microseconds of sampling from one of the buffers, or of torch's argmax of it, in a graph of all."""

    def work() -> None:
        for logits in buffers:
            if given is None:
                torch.argmax(logits, dim=-1, out=out)
            else:
                sample(logits, *given, out=out)

    return round(replay_us(graph_of(work)) / len(buffers), 1)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warn_if_busy()
    torch.manual_seed(0)
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "vocab": VOCAB_SIZE}
    results["check"] = check()
    print(f"against the oracle: {results['check']}")
    for deviation in DEVIATIONS:
        results[f"us_deviation_{deviation:.0f}"] = table(f"deviation {deviation}, microseconds", bench(deviation))
    print(json.dumps(results))


if __name__ == "__main__":
    main()

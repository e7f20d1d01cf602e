"""How fast is one engine, without HTTP? Time to first token by prompt length, time per token by batch size.

Random token ids, no prefix reuse, greedy, `ignore_eos`. The first token's time is one request alone; the time per token
is the median engine step while all sequences decode.

    python -m benchmarks.engine --model benchmarks/models/llama-3.1-8b --load-format DUMMY [--profile]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from typing import Any

import torch

from benchmarks.report import say, warn_if_busy
from pdserve.config import LlmArgs
from pdserve.engine.run.model_runner import ModelRunner
from pdserve.engine.schedule.engine import Engine
from pdserve.engine.schedule.options import EngineOptions
from pdserve.protocol import GenerateRequest, Key, Sampling

_numbers = itertools.count()


def request(rng: random.Random, vocab_size: int, prompt_len: int, output_len: int) -> GenerateRequest:
    """A random prompt that will produce exactly `output_len` tokens."""
    return GenerateRequest(
        key=Key(f"bench-{next(_numbers)}", 0),
        token_ids=[rng.randrange(10, vocab_size) for _ in range(prompt_len)],
        num_prompt_tokens=prompt_len,
        sampling=Sampling(seed=1, max_tokens=output_len, temperature=0.0, ignore_eos=True),
        timeout_s=600,
        phase="both",
    )


def first_token_ms(engine: Engine, rng: random.Random, prompt_len: int, repeats: int) -> float:
    """Median milliseconds from submit to the end of a request of one token, alone."""
    times = []
    for _ in range(repeats + 1):
        engine.submit(request(rng, engine.limits.vocab_size, prompt_len, 1))
        started = time.perf_counter()
        while not engine.step().finished:
            pass
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def token_ms(engine: Engine, rng: random.Random, sequences: int, prompt_len: int, steps: int) -> float:
    """Median milliseconds of a step in which all `sequences` decode."""
    for _ in range(sequences):
        engine.submit(request(rng, engine.limits.vocab_size, prompt_len, steps + 20))
    times = []
    while engine.has_work:
        started = time.perf_counter()
        frame = engine.step()
        if len(frame.deltas) == sequences and not frame.finished:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[5:])


def profile(engine: Engine, rng: random.Random, sequences: int, prompt_len: int) -> str:
    """The kernels of ten decode steps (`prompt_len` 128), or of one prefill, by time."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    for _ in range(sequences):
        engine.submit(request(rng, engine.limits.vocab_size, prompt_len, 40 if sequences else 1))
    if prompt_len <= 128:
        while len(engine.step().deltas) < sequences:
            pass
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(10 if prompt_len <= 128 else 1):
            engine.step()
    while engine.has_work:
        engine.step()
    return profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--load-format", default="AUTO")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 4096, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 128, 256])
    parser.add_argument("--decode-prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-num-tokens", type=int, default=8192)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-overlap", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    graphs: dict[str, Any] = {"cuda_graph_config": None} if given.no_graphs else {}
    args = LlmArgs(
        model=given.model,
        load_format=given.load_format,
        max_num_tokens=given.max_num_tokens,
        max_batch_size=max(given.batches),
        max_seq_len=max(given.prompts) + 1024,
        tensor_parallel_size=given.tensor_parallel_size,
        pipeline_parallel_size=given.pipeline_parallel_size,
        **graphs,
    )
    warn_if_busy()
    say("loading")
    started = time.perf_counter()
    runner = ModelRunner(args)
    runner.warmup()
    result: dict[str, Any] = {"model": given.model, "start_s": round(time.perf_counter() - started, 1)}
    engine = Engine(runner, EngineOptions(enable_block_reuse=False, overlap=not given.no_overlap))
    rng = random.Random(0)
    for prompt_len in given.prompts:
        say(f"first token of {prompt_len}")
        result[f"ttft_ms_{prompt_len}"] = round(first_token_ms(engine, rng, prompt_len, 5), 2)
    for sequences in given.batches:
        say(f"{given.steps} steps of {sequences} sequences")
        result[f"tpot_ms_{sequences}"] = round(token_ms(engine, rng, sequences, given.decode_prompt, given.steps), 3)
    if given.profile:
        print(profile(engine, rng, 1, 128))
        print(profile(engine, rng, max(given.batches), 128))
        print(profile(engine, rng, 1, max(given.prompts)))
    for key, value in result.items():
        print(f"{key:20} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

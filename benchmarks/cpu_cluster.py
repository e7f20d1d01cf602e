"""Is a cluster of two workers on this host's CPU as fast as `transformers.generate`, and what does the proxy add?

Throughput: 8 clients in closed loop through proxy, context and generation worker, against `transformers.generate` with
batch 8 on the same prompts, dtype and output length. The two take turns, so that both see the same machine.
Overhead: one-token requests, alternately through the proxy and straight to the context worker's socket.

    python -m benchmarks.cpu_cluster [--dtype bfloat16] [--rounds 3] [--output-tokens 128]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.report import say, warn_if_busy
from pdserve.model_store import resolve_model
from pdserve.process import configure_logging
from pdserve.protocol import (
    PROTOCOL_VERSION,
    GenerateRequest,
    Hello,
    Key,
    OutputFrame,
    Sampling,
    encode,
    from_worker_decoder,
)
from tests.cluster import MODEL, Cluster

CLIENTS = 8
PROMPT_TOKENS = 128
OVERHEAD_REQUESTS = 40

# Runs in a process of its own, so that torch's threads end with it; one JSON line out for each line in.
_REFERENCE = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM
folder, dtype = sys.argv[1:3]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
for line in sys.stdin:
    job = json.loads(line)
    ids = torch.tensor(job["prompts"])
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                             min_new_tokens=job["tokens"], max_new_tokens=job["tokens"])
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": out.numel() - ids.numel()}), flush=True)
"""


class Reference:
    """`transformers.generate` in a child process."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _REFERENCE, str(folder), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tokens_per_s(self, prompts: list[list[int]], tokens: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"prompts": prompts, "tokens": tokens}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return float(answer["tokens"] / answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


async def cluster_tokens_per_s(session: aiohttp.ClientSession, url: str, prompts: list[list[int]], n: int) -> float:
    """All `prompts` at once, streamed; output tokens over the time until the last one ended."""

    async def one(prompt: list[int]) -> int:
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": n,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage = 0
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    usage = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", usage)
        return int(usage)

    started = time.perf_counter()
    counts = await asyncio.gather(*(one(prompt) for prompt in prompts))
    return sum(counts) / (time.perf_counter() - started)


async def proxy_overhead_ms(
    session: aiohttp.ClientSession, cluster: Cluster, rng: random.Random
) -> tuple[float, float, float]:
    """Median milliseconds of a one-token request through the proxy, straight to the worker, and the difference."""
    worker = next(record for name, record in cluster.workers().items() if name.startswith("context"))
    through, straight = [], []
    async with session.ws_connect(f"{worker['info']['url']}/v1/stream") as socket:
        await socket.send_bytes(encode(Hello(version=PROTOCOL_VERSION, sender="bench")))
        for number in range(OVERHEAD_REQUESTS):
            prompt = _prompt(rng, 16)
            started = time.perf_counter()
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            async with session.post(f"{cluster.url}/v1/completions", json=body) as response:
                response.raise_for_status()
                await response.read()
            through.append((time.perf_counter() - started) * 1e3)
            await asyncio.sleep(0.02)
            straight.append(await _one_token_ms(socket, _prompt(rng, 16), number))
            await asyncio.sleep(0.02)
    a, b = statistics.median(through[5:]), statistics.median(straight[5:])
    return a, b, a - b


async def _one_token_ms(socket: aiohttp.ClientWebSocketResponse, prompt: list[int], number: int) -> float:
    key = Key(f"bench-{number}", 0)
    sampling = Sampling(seed=0, max_tokens=1, temperature=0.0)
    started = time.perf_counter()
    await socket.send_bytes(
        encode(
            GenerateRequest(
                key=key,
                token_ids=prompt,
                num_prompt_tokens=len(prompt),
                sampling=sampling,
                timeout_s=60,
                phase="context",
            )
        )
    )
    while True:
        message = from_worker_decoder.decode(await socket.receive_bytes())
        if isinstance(message, OutputFrame) and any(end.key == key for end in message.finished):
            return (time.perf_counter() - started) * 1e3


def _prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100, 49_000) for _ in range(length)]


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rng = random.Random(7)
    say("starting a cluster and the reference")
    folder = resolve_model(MODEL)
    reference = Reference(folder, arguments.dtype)
    ours, theirs = [], []
    try:
        with tempfile.TemporaryDirectory() as scratch, Cluster(Path(scratch), {"dtype": arguments.dtype}) as cluster:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
                warm = [_prompt(rng, PROMPT_TOKENS) for _ in range(CLIENTS)]
                reference.tokens_per_s(warm, 8)
                await cluster_tokens_per_s(session, cluster.url, warm, 8)
                for number in range(1, arguments.rounds + 1):
                    prompts = [_prompt(rng, PROMPT_TOKENS) for _ in range(CLIENTS)]
                    say(f"round {number} of {arguments.rounds}: transformers")
                    theirs.append(reference.tokens_per_s(prompts, arguments.output_tokens))
                    say(f"round {number} of {arguments.rounds}: {theirs[-1]:.1f} tokens/s; now the cluster")
                    ours.append(await cluster_tokens_per_s(session, cluster.url, prompts, arguments.output_tokens))
                    say(f"round {number} of {arguments.rounds}: {ours[-1]:.1f} tokens/s")
                say(f"{OVERHEAD_REQUESTS} requests of one token through the proxy, and as many straight")
                through, straight, added = await proxy_overhead_ms(session, cluster, rng)
    finally:
        reference.close()
    return {
        "dtype": arguments.dtype,
        "clients": CLIENTS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": arguments.output_tokens,
        "cluster_tokens_per_s": [round(x, 1) for x in ours],
        "transformers_tokens_per_s": [round(x, 1) for x in theirs],
        "ratio_of_medians": round(statistics.median(ours) / statistics.median(theirs), 2),
        "one_token_through_proxy_ms": round(through, 2),
        "one_token_straight_ms": round(straight, 2),
        "proxy_adds_ms": round(added, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-tokens", type=int, default=128)
    arguments = parser.parse_args()
    configure_logging("info")  # the model may have to be converted
    warn_if_busy()
    say(
        f"{arguments.rounds} rounds; three of 128 tokens take one to two minutes on two idle cores, longer on busy ones"
    )
    started_s = time.monotonic()
    result = asyncio.run(measure(arguments))
    say(f"done after {time.monotonic() - started_s:.0f} s")
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()

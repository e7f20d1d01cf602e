"""How fast does a running server answer? Time to first token, time between tokens, throughput, over HTTP.

Random token-id prompts without shared prefixes, greedy, `ignore_eos`, streamed over `/v1/completions`: closed loop with
so many requests at a time (`--concurrency`), or open loop with so many Poisson arrivals a second (`--rate`); one row of
the table for each value given, with prompts of its own (the rows' seeds follow each other). Goodput counts the requests
within both latency limits. Works against any OpenAI-compatible server that takes token ids; `--chat` sends text to
`/v1/chat/completions`. The last line is JSON; `--plot` draws it.

    python -m benchmarks.serve --url http://localhost:8000 --model M --input-len 1024 --output-len 256 \\
        --concurrency 1 16 64 128 --plot load.png
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from benchmarks.report import say, warn_if_busy


@dataclass
class Sample:
    """One request: when it was sent, and when each event with text or tokens came (seconds, one clock)."""

    sent_s: float
    arrivals_s: list[float] = field(default_factory=list)
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_ms(self) -> float:
        return (self.arrivals_s[0] - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float:
        """Mean time a token after the first."""
        return (self.arrivals_s[-1] - self.arrivals_s[0]) * 1e3 / max(1, self.output_tokens - 1)

    @property
    def gaps_ms(self) -> list[float]:
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return [(later - earlier) * 1e3 for earlier, later in pairs]


async def one_request(session: aiohttp.ClientSession, arguments: argparse.Namespace, prompt: list[int]) -> Sample:
    route = "chat/completions" if arguments.chat else "completions"
    text = [{"role": "user", "content": " ".join(map(str, prompt))}]
    body = {
        "model": arguments.model,
        **({"messages": text} if arguments.chat else {"prompt": prompt}),
        "max_tokens": arguments.output_len,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    sample = Sample(time.perf_counter())
    try:
        async with (
            asyncio.timeout(arguments.timeout) as silence,
            session.post(f"{arguments.url}/v1/{route}", json=body) as response,
        ):
            if response.status != 200:
                sample.error = f"{response.status}: {(await response.text())[:200]}"
                return sample
            rest, renewed_s = b"", 0.0
            async for data in response.content.iter_any():
                now_s = time.perf_counter()
                # Not at each event, as aiohttp's `sock_read` does: a new timer takes 0.4 us.
                if now_s - renewed_s > 1.0:
                    silence.reschedule(asyncio.get_running_loop().time() + arguments.timeout)
                    renewed_s = now_s
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    _read_line(sample, line, now_s)
    except (aiohttp.ClientError, TimeoutError) as error:
        sample.error = repr(error)
    if sample.error is None and sample.output_tokens != arguments.output_len:
        sample.error = f"{sample.output_tokens} tokens instead of {arguments.output_len}"
    return sample


def _read_line(sample: Sample, line: bytes, now_s: float) -> None:
    """Take one line of server-sent events over. Most bring nothing but text, which needs no parser to tell: a string
    inside JSON has its quotes escaped, so it can't look like a key."""
    if not line.startswith(b"data: {"):
        return
    if b'"choices":[{' in line and b'"error"' not in line and line.count(b'"usage"') == line.count(b'"usage":null'):
        sample.arrivals_s.append(now_s)
    else:
        _read_event(sample, json.loads(line[6:]), now_s)


def _read_event(sample: Sample, event: dict[str, Any], now_s: float) -> None:
    if "error" in event:
        sample.error = str(event["error"])
    if event.get("choices"):
        sample.arrivals_s.append(now_s)
    if event.get("usage"):
        sample.output_tokens = event["usage"]["completion_tokens"]


async def run(arguments: argparse.Namespace) -> list[Sample]:
    rng = random.Random(arguments.seed)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    gate = asyncio.Semaphore(arguments.concurrency or 1 << 30)
    prompts = [
        [rng.randrange(10, arguments.vocab_size) for _ in range(arguments.input_len)] for _ in range(arguments.requests)
    ]

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def guarded(prompt: list[int]) -> Sample:
            async with gate:
                return await one_request(session, arguments, prompt)

        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(guarded(prompt)))
            if arguments.rate:
                await asyncio.sleep(rng.expovariate(arguments.rate))
        return await asyncio.gather(*tasks)


def percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))] if ordered else float("nan")


def summarize(samples: list[Sample], wall_s: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians and tails over the requests that succeeded, and the count of those that did not."""
    good = [sample for sample in samples if sample.error is None]
    in_time = [s for s in good if s.ttft_ms <= arguments.ttft_limit_ms and s.tpot_ms <= arguments.tpot_limit_ms]
    result: dict[str, Any] = {
        "input_len": arguments.input_len,
        "output_len": arguments.output_len,
        "concurrency": arguments.concurrency,
        "rate": arguments.rate,
        "requests": len(samples),
        "failed": len(samples) - len(good),
        "events": sum(len(s.arrivals_s) for s in good),
        "wall_s": round(wall_s, 3),
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tokens_per_s": round(sum(s.output_tokens for s in good) / wall_s, 1),
        "input_tokens_per_s": round(len(good) * arguments.input_len / wall_s, 1),
        "goodput_requests_per_s": round(len(in_time) / wall_s, 3),
    }
    kinds = {
        "ttft_ms": [s.ttft_ms for s in good],
        "tpot_ms": [s.tpot_ms for s in good if s.output_tokens > 1],
        "itl_ms": [gap for s in good for gap in s.gaps_ms],
    }
    for name, values in kinds.items():
        result |= {f"{name}_p{p}": round(percentile(values, p), 3) for p in (50, 90, 99)}
    result["errors"] = sorted({s.error for s in samples if s.error})[:5]
    return result


COLUMNS = {
    "load": "load",
    "requests": "requests",
    "failed": "failed",
    "requests_per_s": "req/s",
    "goodput_requests_per_s": "goodput",
    "output_tokens_per_s": "out tok/s",
    "input_tokens_per_s": "in tok/s",
    "ttft_ms_p50": "TTFT p50",
    "ttft_ms_p99": "p99",
    "tpot_ms_p50": "TPOT p50",
    "tpot_ms_p99": "p99",
    "itl_ms_p50": "ITL p50",
    "itl_ms_p99": "p99",
}


def table(results: list[dict[str, Any]]) -> str:
    """One line for each load; times in milliseconds."""
    rows = [list(COLUMNS.values())]
    for result in results:
        load = f"{result['input_len']}→{result['output_len']}, {_load(result['concurrency'], result['rate'])}"
        named = {**result, "load": load}
        rows.append([f"{named[key]:.4g}" if isinstance(named[key], float) else str(named[key]) for key in COLUMNS])
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _load(concurrency: int, rate: float) -> str:
    return f"{rate:g}/s" if rate else f"{concurrency} at a time"


def run_load(arguments: argparse.Namespace, concurrency: int, rate: float, row: int = 0) -> dict[str, Any]:
    """One row: the requests of one load, from the first to the end of the last. Another `row` has other prompts."""
    changes = {"concurrency": concurrency, "rate": rate, "seed": arguments.seed + row}
    load = argparse.Namespace(**{**vars(arguments), **changes})
    started = time.perf_counter()
    samples = uvloop.run(run(load))
    return summarize(samples, time.perf_counter() - started, load)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, nargs="*", default=[], help="closed loop: requests at a time")
    parser.add_argument("--rate", type=float, nargs="*", default=[], help="open loop: requests a second")
    parser.add_argument("--vocab-size", type=int, default=49_000)
    parser.add_argument("--ttft-limit-ms", type=float, default=500.0)
    parser.add_argument("--tpot-limit-ms", type=float, default=50.0)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds without a byte that fail a request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chat", action="store_true", help="chats of about that many numbers, not token ids")
    parser.add_argument("--plot", type=Path, help="file for a plot of the rows (needs matplotlib)")
    arguments = parser.parse_args()
    loads = [(count, 0.0) for count in arguments.concurrency] + [(0, rate) for rate in arguments.rate]
    if not loads:
        parser.error("--concurrency or --rate is needed")
    warn_if_busy()
    results = []
    for row, (concurrency, rate) in enumerate(loads):
        say(f"load {row + 1} of {len(loads)}: {arguments.requests} requests, " + _load(concurrency, rate))
        results.append(run_load(arguments, concurrency, rate, row))
    print(table(results))
    for error in sorted({error for result in results for error in result["errors"]}):
        print(error)
    if arguments.plot:
        from benchmarks.plot import draw

        draw({arguments.model: results}, arguments.plot)
    print(json.dumps({"model": arguments.model, "url": arguments.url, "rows": results}))
    return 1 if any(result["failed"] for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())

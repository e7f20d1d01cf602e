"""How fast is a cluster on this host's GPUs over HTTP, and how does the KV travel?

Starts `pdserve up` with the given files, tells which worker sits on which GPU, sends load, and reads the workers' own
counters: transport seen, bytes, bandwidth over the time that payload was under way, and how much of a handoff hid
behind nothing.

    python -m benchmarks.gpu_cluster -c deploy/local.yaml [-c deploy/llama-8b-shape.yaml] [--case 1024:256:1:8 ...]
    python -m benchmarks.gpu_cluster ... -c deploy/one-worker.yaml     # one worker does both phases

A case is input length : output length : load : requests; the load is a number of requests at a time, or with an r a
number of requests a second (1024:256:r4:200).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import serve
from benchmarks.report import say, warn_if_busy
from pdserve.addresses import http_url
from pdserve.config import ClusterConfig
from pdserve.config import load as load_config

START_TIMEOUT_S = 240.0
_SAMPLE = re.compile(r"(pdserve_kv_transfers?\w*_(?:total|sum|count))\{(.*)\} (\S+)")


@contextlib.contextmanager
def running(files: list[Path], overrides: list[str], config: ClusterConfig) -> Iterator[None]:
    """`pdserve up`, ready, and ended afterwards. Its log goes to standard error."""
    command = [sys.executable, "-m", "pdserve", "up", *(part for file in files for part in ("-c", str(file)))]
    command += [f"--{override}" for override in overrides]
    process = subprocess.Popen(command, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _is_ready(f"{http_url(config.hostname, config.port)}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the cluster did not become ready")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def workers(config: ClusterConfig) -> list[dict[str, Any]]:
    with urllib.request.urlopen(f"{http_url(config.manager.hostname, config.manager.port)}/v1/workers") as response:
        return [record["info"] for record in json.load(response)["workers"]]


def transfers(url: str) -> dict[str, Any]:
    """Totals of a worker's transfer counters, and the transports they name."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        text = response.read().decode()
    totals: dict[str, float] = {}
    transports: set[str] = set()
    for name, labels, value in _SAMPLE.findall(text):
        totals[name] = totals.get(name, 0.0) + float(value)
        transports |= set(re.findall(r'transport="([^"]*)"', labels))
    moved, spent_s = (
        totals.get("pdserve_kv_transfer_bytes_total", 0),
        totals.get("pdserve_kv_transfer_seconds_total", 0),
    )
    return {
        "transport": sorted(transports),
        "transfers": totals.get("pdserve_kv_transfers_total", 0),
        "bytes": moved,
        "seconds": round(spent_s, 4),
        "exposed_s": round(totals.get("pdserve_kv_transfer_exposed_seconds_sum", 0), 6),
        "failures": totals.get("pdserve_kv_transfer_failures_total", 0),
    }


def placement() -> str:
    """Which process holds memory on which GPU, as the driver tells it."""
    query = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,used_memory", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def one_case(config: ClusterConfig, case: str, seed: int) -> dict[str, Any]:
    """Each case needs a `seed` of its own, or it finds the prompts of another one cached."""
    input_len, output_len, load, requests = case.split(":")
    rate, concurrency = (float(load[1:]), 0) if load.startswith("r") else (0.0, int(load))
    arguments = argparse.Namespace(
        url=http_url(config.hostname, config.port),
        model=config.model_name,
        input_len=int(input_len),
        output_len=int(output_len),
        requests=int(requests),
        vocab_size=49_000,
        timeout=120.0,
        seed=seed,
        chat=False,
        ttft_limit_ms=500.0,
        tpot_limit_ms=50.0,
    )
    return serve.run_load(arguments, concurrency, rate)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", type=Path, action="append", required=True)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the files")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.set)
    warn_if_busy()
    results: dict[str, Any] = {"config": [str(file) for file in arguments.config], "cases": []}
    with running(arguments.config, arguments.set, config):
        results["workers"] = [f"{info['worker_id']}: {info['device']}, {info['dtype']}" for info in workers(config)]
        print("\n".join(results["workers"]))
        print(f"gpu, pid, memory:\n{placement()}")
        urls = {info["role"]: info["url"] for info in workers(config)}
        one_case(config, "64:8:1:2", seed=0)
        cases = arguments.case or ["128:32:1:4"]
        for number, case in enumerate(cases, start=1):
            say(f"case {number} of {len(cases)}: {case}")
            before = transfers(urls["generation"])
            result = one_case(config, case, seed=number)
            after = transfers(urls["generation"])
            moved, spent_s = after["bytes"] - before["bytes"], after["seconds"] - before["seconds"]
            result["kv_bytes"] = moved
            result["kv_transfers"] = after["transfers"] - before["transfers"]
            result["kv_gb_per_s"] = round(moved / spent_s / 1e9, 2) if spent_s else None
            exposed_s = after["exposed_s"] - before["exposed_s"]
            result["kv_exposed_ms"] = round(1000 * exposed_s / max(1, result["kv_transfers"]), 3)
            result["kv_transport"] = after["transport"]
            results["cases"].append(result)
            say(f"{case}: KV {result['kv_gb_per_s']} GB/s in {result['kv_transfers']:g} transfers")
        print(serve.table(results["cases"]))
        for role, url in urls.items():
            results[role] = transfers(url)
            print(f"{role}: {results[role]}")
    print(json.dumps(results))
    return 1 if any(case["failed"] for case in results["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())

"""What does a streamed token cost outside the GPU? Processor time of each process on its way, microseconds a token.

Everything is real but the model (`benchmarks.paced_engine`): engine process, worker server, manager, proxy, and
`benchmarks.serve` as the client. While all sequences decode, each process's processor time is read from the kernel, so
the figures mean something on a busy machine too, as long as it keeps up: "events" says whether every token had an event
of its own. The route is /v1/completions with token ids and no tokenizer, then /v1/chat/completions with text. The last
line is JSON.

    python -m benchmarks.streaming [--sequences 256] [--step-ms 40] [--seconds 8] [--only completions]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.paced_engine import STEP_VARIABLE
from benchmarks.report import say, warn_if_busy
from tests.cluster import MODEL, free_ports, get_json, metric_of

INPUT_TOKENS = 16
_SETTLE_S = 1.0
_START_TIMEOUT_S = 90.0
_WORKER = """
import sys
from pathlib import Path
from pdserve.config import load
from pdserve.process import die_with_parent
from pdserve.worker.launch import run_worker
die_with_parent()
sys.exit(run_worker(load([Path(sys.argv[1])]), "generation", 0, "benchmarks.paced_engine"))
"""


def settings(arguments: argparse.Namespace, route: str) -> dict[str, Any]:
    proxy, manager, worker = free_ports(3)
    return {
        "model": MODEL,
        "skip_tokenizer_init": route == "completions",
        "port": proxy,
        "manager": {"port": manager},
        "context_servers": {"num_instances": 0},
        "generation_servers": {"port": worker},
        "max_batch_size": arguments.sequences,
        "max_num_tokens": 65536,
    }


@contextlib.contextmanager
def running(config: dict[str, Any], step_ms: float) -> Iterator[dict[str, psutil.Process]]:
    """The cluster's processes by name, ready; ended afterwards."""
    environment = {**os.environ, STEP_VARIABLE: str(step_ms)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cluster.json"
        file.write_text(json.dumps(config))
        commands = {
            "manager": ["-m", "pdserve", "manager", "-c", str(file)],
            "worker server": ["-c", _WORKER, str(file)],
            "proxy": ["-m", "pdserve", "proxy", "-c", str(file)],
        }
        children = {
            name: subprocess.Popen([sys.executable, *command], env=environment) for name, command in commands.items()
        }
        try:
            wait_until(lambda: get_json(f"http://localhost:{config['port']}/health")["status"] == "ready")
            found = {name: psutil.Process(child.pid) for name, child in children.items()}
            found["engine"] = found["worker server"].children()[0]
            yield found
        finally:
            for child in reversed(children.values()):
                child.terminate()
                child.wait(30)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        with contextlib.suppress(OSError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise SystemExit("the cluster did not get there in time")
        time.sleep(0.1)


def client(arguments: argparse.Namespace, port: int, route: str) -> subprocess.Popen[str]:
    """`benchmarks.serve`, with output for some seconds more than are measured."""
    steps = int((arguments.seconds + 4 * _SETTLE_S) * 1000 / arguments.step_ms)
    options = {
        "url": f"http://localhost:{port}",
        "model": MODEL,
        "input-len": INPUT_TOKENS,
        "output-len": steps,
        "requests": arguments.sequences,
        "concurrency": arguments.sequences,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags += ["--chat"] if route == "chat/completions" else []
    return subprocess.Popen([sys.executable, "-m", "benchmarks.serve", *flags], stdout=subprocess.PIPE, text=True)


def measure(arguments: argparse.Namespace, route: str) -> dict[str, Any]:
    """Microseconds a token of each process, and what the client saw."""
    config = settings(arguments, route)
    worker_url = f"http://localhost:{config['generation_servers']['port']}"
    with running(config, arguments.step_ms) as processes, client(arguments, config["port"], route) as load:
        processes["client"] = psutil.Process(load.pid)
        wait_until(lambda: metric_of(worker_url, "pdserve_engine_running") == arguments.sequences)
        time.sleep(_SETTLE_S)
        before, tokens = cpu_s(processes), metric_of(worker_url, "pdserve_engine_decode_tokens_total")
        time.sleep(arguments.seconds)
        after, tokens = cpu_s(processes), metric_of(worker_url, "pdserve_engine_decode_tokens_total") - tokens
        row = json.loads(load.communicate()[0].splitlines()[-1])["rows"][0]
    names = ("engine", "worker server", "proxy", "client")
    return {
        "route": route,
        **{f"{name} us": round((after[name] - before[name]) * 1e6 / tokens, 2) for name in names},
        "tokens/s": round(tokens / arguments.seconds),
        "events": round(row["events"] / (row["requests"] * row["output_len"]), 3),
        "failed": row["failed"],
        "ITL p50 ms": row["itl_ms_p50"],
        "p99": row["itl_ms_p99"],
    }


def cpu_s(processes: dict[str, psutil.Process]) -> dict[str, float]:
    times = {name: process.cpu_times() for name, process in processes.items()}
    return {name: time.user + time.system for name, time in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--step-ms", type=float, default=40.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=("completions", "chat/completions"))
    arguments = parser.parse_args()
    routes = [arguments.only] if arguments.only else ["completions", "chat/completions"]
    warn_if_busy()
    rows = []
    for route in routes:
        say(f"{route}: {arguments.seconds:g} s, and some for the start")
        rows.append(measure(arguments, route))
    for name in rows[0]:
        print(f"{name:18}", *(f"{row[name]!s:>18}" for row in rows))
    print(json.dumps({"sequences": arguments.sequences, "step_ms": arguments.step_ms, "rows": rows}))
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

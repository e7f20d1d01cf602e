"""`pdserve up`: every process of a cluster on this host, started, watched, restarted and ended together.

Order: the model is made ready, then manager, proxy and workers start; a worker registers by itself when its engine is
warm. A process that ends unasked is restarted with back-off, except when its status says that the configuration is
at fault: then the whole cluster stops. Ctrl-C and SIGTERM drain: proxy first, then workers, then the manager; a
second signal kills. Children ask the kernel to end them with this process, so nothing stays behind however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

from pdserve.cluster_api import WorkerList
from pdserve.config import ClusterConfig
from pdserve.devices import gpu_environment, visible_gpus
from pdserve.errors import Aborted
from pdserve.model_store import resolve_model
from pdserve.process import child_environment

log = logging.getLogger("pdserve.up")

EXIT_CONFIG = 2
_BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
_HEALTHY_AFTER_S = 60.0
_KILL_MARGIN_S = 15.0
_POLL_S = 0.1
_WAITING_EVERY_S = 10.0


class Child:
    """One process under supervision, over all its restarts."""

    def __init__(self, name: str, argv: list[str], environment: dict[str, str], width: int) -> None:
        self.name = name
        self.config_error = False
        self._argv = argv
        self._environment = environment
        self._prefix = f"{name:<{width}} | "
        self._process: asyncio.subprocess.Process | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> None:
        """Keep the process running until `stop`, or until it says that its configuration is at fault."""
        failures = 0
        while not self._stopped.is_set():
            started = time.monotonic()
            status = await self._run_once()
            if self._stopped.is_set():
                return
            if status == EXIT_CONFIG:
                self.config_error = True
                return
            failures = 1 if time.monotonic() - started > _HEALTHY_AFTER_S else failures + 1
            pause_s = _BACKOFF_S[min(failures, len(_BACKOFF_S)) - 1]
            self.say(f"ended with status {status}; restarting in {pause_s:.0f} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), pause_s)

    async def _run_once(self) -> int:
        process = await asyncio.create_subprocess_exec(
            *self._argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=self._environment,
            limit=1 << 20,
        )
        self._process = process
        self.say(f"started, pid {process.pid}")
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                line = b"(a line of over 1 MiB was left out)\n"
            if not line:
                break
            self.say(line.decode(errors="replace").rstrip())
        return await process.wait()

    def say(self, text: str) -> None:
        """A line of the common log."""
        sys.stdout.write(f"{self._prefix}{text}\n")
        sys.stdout.flush()

    def signal(self, number: signal.Signals) -> None:
        """Tell the process to end (SIGKILL: its whole process group's leader at once), and do not restart it."""
        self._stopped.set()
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


class Supervisor:
    """All processes of one configuration."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._width = max(len("generation-0"), len("context-0")) + 1

    async def run(self) -> int:
        """Run until told to stop; returns the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._prepare_models()
        except Aborted:
            return 0
        with tempfile.TemporaryDirectory(prefix="pdserve-up-") as folder:
            file = Path(folder) / "effective.json"
            file.touch(mode=0o600)
            file.write_text(json.dumps(self._config.model_dump(mode="json")))
            children = self._children(file)
            tasks = {asyncio.create_task(child.run(), name=child.name): child for child in children}
            announce = asyncio.create_task(self._announce(children))
            stop = asyncio.create_task(self._stop.wait())
            await asyncio.wait({stop, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            announce.cancel()
            stop.cancel()
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()
            await self._end(tasks)
        if any(child.config_error for child in children):
            print("up: stopped, because the configuration is at fault (see above)", file=sys.stderr)  # noqa: T201
            return EXIT_CONFIG
        return 0

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._kill.set()
            return
        grace_s = self._config.disagg_cluster.drain_timeout_sec
        self._say(f"stopping; open requests get {grace_s:.0f} s, Ctrl-C again ends them")
        self._stop.set()

    async def _prepare_models(self) -> None:
        pools = (self._config.context_servers, self._config.generation_servers)
        for model in dict.fromkeys(pool.model for pool in pools if pool.num_instances):
            self._say(f"model {model}: preparing")
            folder = await asyncio.to_thread(resolve_model, model, self._stop.is_set)
            self._say(f"model {model}: {folder}")

    def _say(self, text: str) -> None:
        sys.stdout.write(f"{'up':<{self._width}} | {text}\n")
        sys.stdout.flush()

    def _children(self, file: Path) -> list[Child]:
        config = self._config
        roles = [("context", n) for n in range(config.context_servers.num_instances)]
        roles += [("generation", n) for n in range(config.generation_servers.num_instances)]
        wanted = [self._gpus_wanted(role) for role, _ in roles]
        gpus = visible_gpus() if any(wanted) else []
        if sum(wanted) > len(gpus) > 0:
            ranks = "workers" if max(wanted) == 1 else "ranks of workers"
            self._say(f"{sum(wanted)} {ranks} share {len(gpus)} GPUs: keep free_gpu_memory_fraction low enough")
        children = [self._child(name, [name], file, {}) for name in ("manager", "proxy")]
        for number, (role, index) in enumerate(roles):
            extra = gpu_environment(gpus, sum(wanted[:number])) if wanted[number] else {}
            children.append(self._child(f"{role}-{index}", [role, f"--index={index}"], file, extra))
        return children

    def _gpus_wanted(self, role: str) -> int:
        """By one worker of `role`: one for each of its ranks."""
        pool = self._config.context_servers if role == "context" else self._config.generation_servers
        return 0 if pool.device == "cpu" else pool.tensor_parallel_size * pool.pipeline_parallel_size

    def _child(self, name: str, command: list[str], file: Path, extra: dict[str, str]) -> Child:
        argv = [sys.executable, "-m", "pdserve", *command, "-c", str(file)]
        environment = child_environment(PYTHONUNBUFFERED="1", **extra)
        # What the file says is final; variables were merged into it already.
        for key in [key for key in environment if key.startswith("PDSERVE_") and key.partition("__")[2]]:
            del environment[key]
        return Child(name, argv, environment, self._width)

    async def _end(self, tasks: dict[asyncio.Task[None], Child]) -> None:
        """Drain in order: proxy, workers, manager."""
        for group in (("proxy",), ("context", "generation"), ("manager",)):
            members = {task: child for task, child in tasks.items() if child.name.split("-")[0] in group}
            await self._end_group(members)

    async def _end_group(self, members: dict[asyncio.Task[None], Child]) -> None:
        for child in members.values():
            child.signal(signal.SIGTERM)
        if not members:
            return
        grace_s = self._config.disagg_cluster.drain_timeout_sec + _KILL_MARGIN_S
        kill = asyncio.create_task(self._kill.wait())
        ended = asyncio.create_task(_all_ended(list(members)))
        await asyncio.wait({kill, ended}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        kill.cancel()
        for task, child in members.items():
            if not task.done():
                child.say("still there; killing it")
                child.signal(signal.SIGKILL)
        await ended

    async def _announce(self, children: list[Child]) -> None:
        """Print a line as each process becomes ready, and what to try once all are."""
        config = self._config
        manager = f"http://{config.manager.hostname}:{config.manager.port}"
        front = f"http://{config.hostname}:{config.port}"
        waiting = {child.name: child for child in children}
        started = said = time.monotonic()
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            while waiting:
                ready = await _registered(session, manager)
                for name, url in (("manager", f"{manager}/health"), ("proxy", f"{front}/health")):
                    if name in waiting and await _answers(session, url):
                        ready.add(name)
                for name in [name for name in waiting if any(r.partition(".")[0] == name for r in ready)]:
                    waiting.pop(name).say(f"ready after {time.monotonic() - started:.1f} s")
                if waiting and time.monotonic() - said > _WAITING_EVERY_S:
                    said = time.monotonic()
                    self._say(f"waiting for {', '.join(waiting)}; {said - started:.0f} s")
                await asyncio.sleep(_POLL_S)
        self._say(f"all {len(children)} processes are ready; try:")
        self._say(f"curl {front}/v1/{_example(config)}")


def _example(config: ClusterConfig) -> str:
    """Route and arguments of a request that this cluster answers."""
    chat = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    tokens = {"prompt": [1, 2, 3], "return_token_ids": True}
    route = "completions" if config.skip_tokenizer_init else "chat/completions"
    body = json.dumps({"model": config.model_name, **(tokens if config.skip_tokenizer_init else chat)})
    return f"{route} -H 'Content-Type: application/json' -d '{body}'"


async def _all_ended(tasks: list[asyncio.Task[None]]) -> bool:
    await asyncio.gather(*tasks, return_exceptions=True)
    return True


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def _registered(session: aiohttp.ClientSession, manager: str) -> set[str]:
    try:
        async with session.get(f"{manager}/v1/workers") as response:
            if response.status != 200:
                return set()
            workers = WorkerList.model_validate_json(await response.read()).workers
    except (aiohttp.ClientError, TimeoutError, OSError):
        return set()
    return {record.info.worker_id for record in workers}

"""`pdserve up`: every process of a cluster on this host, started, watched, restarted and ended together.

Order: the addresses are tried and the model is made ready, then manager, proxy and workers start; a worker registers by
itself when its engine is warm. A process that ends unasked is restarted with back-off, except when its status says that
its configuration or its address is at fault: then the whole cluster stops (`child`). Ctrl-C, SIGTERM and the end of the
terminal drain: proxy first, then workers, then the manager; a second signal kills. Children get the configuration on
their standard input, so no file is left, and ask the kernel to end them with this process, so nothing stays behind
however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time

import yaml

from pdserve.addresses import http_url
from pdserve.child import Child
from pdserve.config import ClusterConfig, is_setting
from pdserve.devices import gpu_environment, visible_gpus
from pdserve.errors import Aborted, ListenError
from pdserve.http import bind
from pdserve.log_output import escaped, standard_output
from pdserve.model_store import resolve_model
from pdserve.process import EXIT_ADDRESS, EXIT_OK, child_environment, stop_signals
from pdserve.readiness import Readiness

_KILL_MARGIN_S = 15.0
_POLL_S = 0.1
_WAITING_EVERY_S = 10.0


class Supervisor:
    """All processes of one configuration."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._stop = asyncio.Event()
        self._kill = asyncio.Event()
        self._width = max(len("generation-0"), len("context-0")) + 1

    async def run(self) -> int:
        """Run until told to stop; returns the exit status.

        Raises:
            ListenError: an address is taken, or not this host's.
            ConfigError: the model can't be served.
        """
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._on_signal, number)
        self._try_addresses()
        try:
            await self._prepare_models()
        except Aborted:
            return EXIT_OK
        children = self._children()
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
        status = next((child.fatal_status for child in children if child.fatal_status is not None), EXIT_OK)
        if status != EXIT_OK:
            what = "an address can't be had" if status == EXIT_ADDRESS else "the configuration is at fault"
            self._say(f"stopped, because {what} (see above)")
        standard_output().flush()
        return status

    def _try_addresses(self) -> None:
        """Find out now, and not after minutes of loading, that an address is taken. Raises ListenError."""
        config = self._config
        addresses = [("manager", config.manager.hostname, config.manager.port), ("proxy", config.hostname, config.port)]
        for role, pool in (("context", config.context_servers), ("generation", config.generation_servers)):
            workers = range(pool.num_instances if pool.port else 0)
            addresses += [(f"{role}-{index}", pool.hostname, pool.port + index) for index in workers]
        with contextlib.ExitStack() as tried:
            for name, hostname, port in addresses:
                try:
                    # Two sockets may be bound to one port before either listens.
                    tried.enter_context(bind(hostname, port)).listen(1)
                except ListenError as error:
                    raise ListenError(f"{name} {error.message}", error.param) from None

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            if number is not signal.SIGHUP:  # which comes twice: from the terminal and from its shell
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
        standard_output().write(f"{'up':<{self._width}} | {escaped(text)}")

    def _children(self) -> list[Child]:
        config = self._config
        roles = [("context", n) for n in range(config.context_servers.num_instances)]
        roles += [("generation", n) for n in range(config.generation_servers.num_instances)]
        wanted = [self._gpus_wanted(role) for role, _ in roles]
        gpus = visible_gpus() if any(wanted) else []
        if sum(wanted) > len(gpus) > 0:
            ranks = "workers" if max(wanted) == 1 else "ranks of workers"
            self._say(f"{sum(wanted)} {ranks} share {len(gpus)} GPUs: keep free_gpu_memory_fraction low enough")
        children = [self._child(name, [name], {}) for name in ("manager", "proxy")]
        for number, (role, index) in enumerate(roles):
            extra = gpu_environment(gpus, sum(wanted[:number])) if wanted[number] else {}
            children.append(self._child(f"{role}-{index}", [role, f"--index={index}"], extra))
        return children

    def _gpus_wanted(self, role: str) -> int:
        """By one worker of `role`: one for each of its ranks."""
        pool = self._config.context_servers if role == "context" else self._config.generation_servers
        return 0 if pool.device == "cpu" else pool.tensor_parallel_size * pool.pipeline_parallel_size

    def _child(self, name: str, command: list[str], extra: dict[str, str]) -> Child:
        argv = [sys.executable, "-m", "pdserve", *command, "-c", "-"]
        # What it reads is final: variables are in it, and below what the flags said.
        environment = {key: value for key, value in child_environment().items() if not is_setting(key)}
        configuration = yaml.safe_dump(self._config.model_dump(mode="json"), allow_unicode=True).encode()
        return Child(name, argv, {**environment, "PYTHONUNBUFFERED": "1", **extra}, configuration, self._width)

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
        started_s = time.monotonic()
        waiting = {child.name: child for child in children}
        said_s = started_s
        async with Readiness(self._config) as readiness:
            while waiting:
                asked = {name: child.instance for name, child in waiting.items()}
                for name in await readiness.ready(asked):
                    child = waiting.pop(name)
                    child.was_ready = True
                    child.say(f"ready after {time.monotonic() - started_s:.1f} s")
                if waiting and time.monotonic() - said_s > _WAITING_EVERY_S:
                    said_s = time.monotonic()
                    self._say(f"waiting for {', '.join(waiting)}; {said_s - started_s:.0f} s")
                await asyncio.sleep(_POLL_S)
        if not self._config.generation_servers.num_instances:
            self._say(f"all {len(children)} processes are ready; nothing is served before a generation worker joins")
            return
        self._say(f"all {len(children)} processes are ready; try:")
        self._say(f"curl {http_url(self._config.hostname, self._config.port)}/v1/{_example(self._config)}")


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

"""Entry of a worker's server process, the same for both roles."""

from __future__ import annotations

from pdserve.config import ClusterConfig
from pdserve.errors import ConfigError
from pdserve.process import run_loop
from pdserve.protocol import Role
from pdserve.worker.server import WorkerServer

ENGINE_MODULE = "pdserve.roles.main"
"""Builds the engine of either role; run with `python -m`. Tests and benchmarks bring their own."""


def run_worker(config: ClusterConfig, role: Role, index: int, engine_module: str = ENGINE_MODULE) -> int:
    """Run worker number `index` of its pool until it ends; returns the exit status.

    Raises:
        ConfigError: the pool has no such worker.
        ListenError: its port is taken.
    """
    pool = config.context_servers if role == "context" else config.generation_servers
    if not 0 <= index < pool.num_instances:
        raise ConfigError(f"{role}_servers.num_instances: {pool.num_instances}, so there is no worker {index}")

    async def serve() -> int:
        return await WorkerServer(config, pool, role, index, engine_module).run()

    return run_loop(serve)

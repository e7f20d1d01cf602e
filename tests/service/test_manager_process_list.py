"""What `ps` shows of workers whose heartbeats another manager hears."""

from __future__ import annotations

from pdserve.cluster_client import ClusterClient
from pdserve.config import ClusterConfig
from pdserve.process_list import collect
from tests.fakes.fake_worker import FakeWorker
from tests.manager import TestManager, worker


async def test_the_load_of_a_worker_that_beats_elsewhere_is_asked_of_itself() -> None:
    """`ps` over a manager that hears none of its heartbeats."""
    each = FakeWorker("context-0", "context", health={"load": {"running": 3, "blocks_total": 9, "colour": "red"}})
    silent = worker("generation-0", role="generation", url="http://127.0.0.1:1")
    await each.start()
    async with TestManager(inactive_timeout_sec=60) as manager, ClusterClient(manager.url) as client:
        await client.register(each.record().info)
        await client.register(silent)
        keys = {"model": "m", "port": 1, "context_servers": {}, "generation_servers": {}}
        found = await collect(
            ClusterConfig.model_validate({**keys, "manager": {"hostname": "127.0.0.1", "port": manager.port}})
        )
    await each.stop()
    assert [(row.name, row.running, row.blocks_total) for row in found.rows[2:]] == [
        ("context-0", 3, 9),
        ("generation-0", 0, 0),
    ]

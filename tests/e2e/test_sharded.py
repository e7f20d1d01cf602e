"""Workers of several ranks: the same answers, whoever holds which heads and layers of the cache on either side."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.cluster import Cluster
from tests.e2e.reference import PROMPTS, Reference
from tests.e2e.test_answers import complete, greedy
from tests.listeners import listening_addresses, outer
from tests.small_model import KV_BYTES_PER_TOKEN, SMALL_MODEL

# Two ranks of heads, 2 and 1 of three, hand over to two ranks of layers, 4 and 2 of six, in other blocks.
SHARDED: dict[str, Any] = {
    "num_threads": 1,
    "context_servers": {"tensor_parallel_size": 2},
    "generation_servers": {
        "pipeline_parallel_size": 2,
        "pp_partition": [4, 2],
        "kv_cache_config": {"tokens_per_block": 16},
    },
}


def ranks_of(worker: dict[str, Any]) -> list[psutil.Process]:
    """The followers of a worker's engine."""
    server = psutil.Process(worker["info"]["pid"])
    return [each for each in server.children(recursive=True) if "pdserve.roles.follower" in " ".join(each.cmdline())]


async def test_answers_and_bytes_and_the_loss_of_a_rank(
    tmp_path: Path, small_model: Path, small_reference: Reference
) -> None:
    with Cluster(tmp_path, {"model": str(small_model), **SHARDED}) as cluster:
        name = "pdserve_kv_transfer_bytes_total"
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(
                *(complete(session, cluster.url, greedy(prompt, model=SMALL_MODEL)) for prompt in PROMPTS[:8])
            )
            for prompt, answer in zip(PROMPTS, answers, strict=False):
                assert answer["choices"][0]["text"] == small_reference.text(prompt)
            listening = {each.pid: listening_addresses(each.pid) for each in cluster.processes()}
            assert sum(bool(addresses) for addresses in listening.values()) >= 6, "servers, engines, followers"
            assert not any(map(outer, listening.values())), "loopback means loopback"
            before = cluster.metric("generation-0", name, direction="received")
            await complete(session, cluster.url, greedy([100 + n for n in range(70)], model=SMALL_MODEL))
            await asyncio.sleep(0.5)
            assert cluster.metric("generation-0", name, direction="received") - before >= 70 * KV_BYTES_PER_TOKEN
            ranks = {worker_id: ranks_of(worker) for worker_id, worker in cluster.workers().items()}
            assert [len(ranks[worker_id]) for worker_id in ("context-0", "generation-0")] == [1, 1]
            os.kill(ranks["context-0"][0].pid, signal.SIGKILL)
            answer = await complete(session, cluster.url, greedy(PROMPTS[8], model=SMALL_MODEL))
            assert answer["choices"][0]["text"] == small_reference.text(PROMPTS[8]), "the worker was restarted"
    assert "rank 1 (pid" in cluster.log.read_text()

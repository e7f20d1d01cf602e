"""A cluster without context workers: its generation workers run prefill and decode themselves."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp

from tests.cluster import Cluster, get_json
from tests.e2e.reference import PROMPTS, Reference
from tests.e2e.test_answers import complete, greedy
from tests.small_model import SMALL_MODEL


async def test_generation_workers_do_both_phases(tmp_path: Path, small_model: Path, small_reference: Reference) -> None:
    with Cluster(tmp_path, {"model": str(small_model), "context_servers": {"num_instances": 0}}) as cluster:
        status = get_json(f"{cluster.manager_url}/v1/cluster")
        assert status["ready"]
        assert status["context_servers"]["required"] == 0
        async with aiohttp.ClientSession() as session:
            answers = await asyncio.gather(
                *(complete(session, cluster.url, greedy(prompt, model=SMALL_MODEL)) for prompt in PROMPTS[:6])
            )
        for prompt, answer in zip(PROMPTS, answers, strict=False):
            assert answer["choices"][0]["text"] == small_reference.text(prompt)
        assert cluster.metric("generation-0", "pdserve_kv_transfer_bytes_total", direction="received") == 0
